"""Moves a ControlNet to another base of its family.

    python -m tools.transfer canny.safetensors --from sd15 --to dreamlike.safetensors --out canny-dreamlike.safetensors

A ControlNet is a trained copy of its base's encoder. What distinguishes the encoders of the two bases is added to it:

    copy for the new base = copy + (the new base's encoder - the old base's encoder)

as the paper's authors did for their transferred models (ControlNet's repository, tool_transfer_control.py). Its hint
encoder and zero convolutions stay. A file that holds a difference needs no --from: the new base is added to it.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # for `python tools/transfer.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.cli import add_output, check_output, layout_of, new_parser, note, run, written


def main(argv: list[str] | None = None) -> int:
    return run("transfer", transfer, parse_args(argv))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("transfer", __doc__)
    parser.add_argument("control", metavar="CONTROL", help="the ControlNet, in any layout")
    bases = parser.add_argument_group("bases: files, folders in diffusers' layout, or presets (sd15, sd21)")
    bases.add_argument(
        "--from",
        dest="old",
        metavar="BASE",
        help="that CONTROL was trained on (default: the one that is in CONTROL's file, as in those of version 1.0)",
    )
    bases.add_argument("--to", dest="new", metavar="BASE", required=True, help="that it will be used with")
    add_output(parser)
    return parser.parse_args(argv)


def transfer(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    from ldm.checkpoints.checkpoint import open_checkpoint
    from ldm.checkpoints.recognise import recognise_control
    from tools.checkpoints import load_base, load_control, torch_dtype

    checkpoint = open_checkpoint(args.control)
    is_difference = recognise_control(checkpoint).difference
    old_name = None if is_difference else args.old or base_in(checkpoint)
    if is_difference and args.old:
        note(f"{args.control} holds a difference: --from {args.old} is not needed")

    new = load_base(args.new).unet
    control = load_control(args.control, new, torch_dtype(args.dtype))
    check_family(control, new, args.control, args.new)
    if old_name:
        old = load_base(old_name).unet
        check_family(control, old, args.control, old_name)
        control.transfer(old, new)
    with written(args.out, args.force) as path:
        control.save(path, layout=layout_of(args.out))


def base_in(checkpoint) -> str:
    """The file itself, if it holds its base, too; else raises ValueError."""
    if checkpoint.any_key("model.diffusion_model."):
        return str(checkpoint.path)
    raise ValueError(f'"{checkpoint.path}" holds a ControlNet alone: say with --from which base it was trained on')


def check_family(control, unet, control_name: str, base_name: str) -> None:
    """Raises ValueError for a base whose encoder is not of the copy's architecture."""
    from ldm.checkpoints.checkpoint import made_for

    own, other = control.encoder.config, unet.config
    if own != other:
        raise ValueError(
            f'"{control_name}" is {made_for((own.context_width,))} and "{base_name}" is '
            f"{made_for((other.context_width,))} or of other sizes: a ControlNet can be moved within its family only"
        )


if __name__ == "__main__":
    sys.exit(main())
