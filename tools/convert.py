"""Converts a model: its layout, its precision, or which part of it is kept.

    python -m tools.convert v1-5-pruned.ckpt --out sd15.safetensors --dtype fp16
    python -m tools.convert sd15.safetensors --out sd15-diffusers
    python -m tools.convert control_sd15_canny.pth --part control --out canny.safetensors
    python -m tools.convert canny.safetensors --difference --base sd15 --out canny-difference.safetensors

The layouts are that of the original repositories (one file) and that of diffusers (a folder); pickles can be read, too.
Only the model is written: EMA weights, optimizer states and the tables of the noise schedule are left out. Converting
to the other layout and back gives the same bits, except that diffusers' has no place for the last layer of SD 2.x's
text encoder, which is never used.
"""

import argparse
import sys

from controlnet.common.program import flag_of, new_parser
from tools.cli import add_output, check_output, layout_of, run_tool, written


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.convert", __doc__)
    parser.add_argument("source", metavar="IN", help="a file, a folder in diffusers' layout, or a preset (sd15, sd21)")
    kept = parser.add_argument_group("what is kept")
    parts = ("base", "control", "both")
    kept.add_argument("--part", choices=parts, help="of a file that has both (default: the only one there is)")
    kept.add_argument("--vae", metavar="FILE", help="in place of a base's autoencoder, or where it has none")
    kept.add_argument("--ema", action="store_true", help="take the EMA of the UNet's weights")
    unsaid = parser.add_argument_group("what the source may not say; the result will")
    unsaid.add_argument("--prediction", choices=("eps", "v", "x0"), help="of a base (default: as detected)")
    unsaid.add_argument("--zero-snr", action="store_true", help="of a base: trained with zero terminal SNR")
    pooling = "of a ControlNet: it is a shuffle model of version 1.1 (default: as detected)"
    unsaid.add_argument("--global-average-pooling", action="store_true", default=None, help=pooling)
    difference = parser.add_argument_group("differences: ControlNets minus a base's encoder, for any of the family")
    difference.add_argument("--difference", action="store_true", help="write one; needs the --base it was trained on")
    difference.add_argument("--base", metavar="FILE", help="to subtract, or to add to IN if that is a difference")
    add_output(parser)
    return run_tool(parser, argv, convert)


def convert(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    layout = layout_of(args.out)
    check_difference(args, layout)
    from controlnet.common.devices import PRECISIONS
    from ldm.checkpoints.open import open_checkpoint
    from tools.checkpoints import find_model, load_base, load_control, load_unet, save_whole
    from tools.description import contents

    part = args.part or only_part(contents(open_checkpoint(find_model(args.source)[0])), args.source)
    check_options(args, part)
    dtype = PRECISIONS.get(args.dtype)
    base = load_unet(args.base) if args.base is not None else None
    if part != "control":
        base_options = dict(prediction=args.prediction, zero_snr=args.zero_snr, vae=args.vae)
        sd = load_base(args.source, dtype, args.ema, **base_options)
    if part != "base":
        control = load_control(args.source, base, dtype, args.global_average_pooling)
    with written(args.out, args.force) as path:
        if part == "both":
            save_whole(path, sd, control)
        elif part == "base":
            sd.save(path, layout=layout)
        else:
            control.save(path, layout=layout, difference_to=base if args.difference else None)


def only_part(found, source: str) -> str:
    """ "base" or "control"; "base", too, for a file that has neither, as loading it then says what else it is.

    Raises ValueError for a file that has both.
    """
    if found.base and found.control:
        raise ValueError(f'"{source}" holds a base and its ControlNet: say --part base, --part control or --part both')
    return "control" if found.control else "base"


def check_difference(args: argparse.Namespace, layout: str) -> None:
    """Raises ValueError for options that contradict each other."""
    if args.difference and args.base is None:
        raise ValueError("--difference needs the --base that the ControlNet was trained on")
    if args.difference and layout != "ldm":
        raise ValueError("differences have no place in diffusers' layout: give --out a name that ends in .safetensors")
    if args.part == "both" and (args.difference or layout != "ldm"):
        raise ValueError("--part both is one file in the original layout: convert the base and the ControlNet apart")


def check_options(args: argparse.Namespace, part: str) -> None:
    """Raises ValueError for an option about what is not written."""
    of_bases, of_controls = ("ema", "vae", "prediction", "zero_snr"), ("difference", "base", "global_average_pooling")
    strangers = {"base": of_controls, "control": of_bases}.get(part, ())
    if given := [flag_of(name) for name in strangers if getattr(args, name)]:
        raise ValueError(f"{given[0]} does not go with a {'base' if part == 'base' else 'ControlNet'}: leave it out")


if __name__ == "__main__":
    sys.exit(main())
