"""Moves a ControlNet to another base of its family.

    python -m tools.transfer canny.safetensors --from sd15 --to dreamlike.safetensors --out canny-dreamlike.safetensors

A ControlNet is a trained copy of its base's encoder. The difference between the two bases' encoders is added to it,

    copy for the new base = copy + (the new base's encoder - the old base's encoder)

as the paper's authors did for their transferred models (ControlNet's repository, tool_transfer_control.py). Its hint
encoder and zero convolutions stay. A file that holds a difference needs no --from: the new base is added to it.
"""

import argparse
import sys

from controlnet.common.program import new_parser, note
from tools.cli import add_output, check_output, layout_of, run_tool, written


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.transfer", __doc__)
    parser.add_argument("control", metavar="CONTROL", help="the ControlNet, in any layout")
    bases = parser.add_argument_group("bases: files, folders in diffusers' layout, or presets (sd15, sd21)")
    trained = "that CONTROL was trained on (default: the one in its own file, as in those of version 1.0)"
    bases.add_argument("--from", dest="old", metavar="BASE", help=trained)
    bases.add_argument("--to", dest="new", metavar="BASE", required=True, help="that it will be used with")
    add_output(parser)
    return run_tool(parser, argv, transfer)


def transfer(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    from controlnet.common.devices import PRECISIONS
    from controlnet.layouts import recognise_control
    from ldm.checkpoints.open import open_checkpoint
    from tools.checkpoints import find_model, load_control, load_unet

    control_name = str(find_model(args.control)[0])
    checkpoint = open_checkpoint(control_name)
    is_difference, old_name = recognise_control(checkpoint).needs_base, args.old
    if is_difference and old_name is not None:
        note(f"{args.control} holds a difference: --from {old_name} is not needed")
    if not is_difference and old_name is None:
        if not checkpoint.any_key("model.diffusion_model."):
            raise ValueError(f'"{args.control}" holds a ControlNet alone: say with --from which base it was trained on')
        old_name = control_name

    new = load_unet(args.new)
    control = load_control(args.control, new, PRECISIONS.get(args.dtype))
    if not is_difference:
        control.transfer(load_unet(old_name), new)
    with written(args.out, args.force) as path:
        control.save(path, layout=layout_of(args.out))


if __name__ == "__main__":
    sys.exit(main())
