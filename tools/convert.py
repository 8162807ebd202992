"""Converts a model: its layout, its precision, or what of it is kept.

    python -m tools.convert v1-5-pruned.ckpt --out sd15.safetensors --dtype fp16
    python -m tools.convert sd15.safetensors --out sd15-diffusers
    python -m tools.convert control_sd15_canny.pth --part control --out canny.safetensors
    python -m tools.convert canny.safetensors --difference --base sd15 --out canny-difference.safetensors

Layouts are those of the original repositories (one file) and of diffusers (a folder): any that is read, and pickles,
can be the source. What is written is the model alone; moving averages, optimisers' states and schedules' tables are
left out. From one layout to the other and back gives the same bits; but diffusers' has no place for the last layer of
SD 2.x's text encoder, which is never used.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # for `python tools/convert.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.cli import add_output, check_output, layout_of, new_parser, run, written


def main(argv: list[str] | None = None) -> int:
    return run("convert", convert, parse_args(argv))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("convert", __doc__)
    parser.add_argument("source", metavar="IN", help="a file, a folder in diffusers' layout, or a preset (sd15, sd21)")
    what = parser.add_argument_group("what is kept")
    what.add_argument(
        "--part",
        choices=("base", "control", "both"),
        help="of a file that has a base and a ControlNet, as those of version 1.0 (default: what there is, if it is "
        "one of them)",
    )
    what.add_argument("--ema", action="store_true", help="the moving average in place of the UNet's weights")
    described = parser.add_argument_group("what a file may not tell, and ours then does")
    described.add_argument("--prediction", choices=("eps", "v", "x0"), help="of a base (default: as found)")
    described.add_argument(
        "--global-average-pooling",
        action="store_true",
        default=None,
        help="of a ControlNet: it is one of version 1.1's shuffle kind (default: as found)",
    )
    difference = parser.add_argument_group(
        "differences: ControlNets minus a base's encoder, for any base of its family"
    )
    difference.add_argument("--difference", action="store_true", help="write one; needs --base, that it was trained on")
    difference.add_argument("--base", metavar="FILE", help="to subtract, or to add to IN if that is a difference")
    add_output(parser)
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    check_differences(args)
    part = args.part or part_of(args.source)
    check_options(args, part)
    if part == "base":
        convert_base(args)
    elif part == "control":
        convert_control(args)
    else:
        convert_both(args)


def check_differences(args: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other."""
    if args.difference and args.base is None:
        raise ValueError("--difference needs the --base that the ControlNet was trained on")
    if args.difference and layout_of(args.out) != "ldm":
        raise ValueError("differences have no place in diffusers' layout: give --out a name that ends in .safetensors")


def check_options(args: argparse.Namespace, part: str) -> None:
    """Raises ValueError for an option about what is not written."""
    of_bases = {"--ema": args.ema, "--prediction": args.prediction}
    of_controls = {
        "--difference": args.difference,
        "--base": args.base,
        "--global-average-pooling": args.global_average_pooling,
    }
    strangers = {"base": of_controls, "control": of_bases}.get(part, {})
    for option in (option for option, value in strangers.items() if value):
        raise ValueError(f"{option} does not go with a {'base' if part == 'base' else 'ControlNet'}: leave it out")


def part_of(source: str) -> str:
    """ "base" or "control". Raises ValueError for a file that has both, CheckpointError for one that has none."""
    from ldm.checkpoints.checkpoint import CheckpointError, open_checkpoint
    from ldm.checkpoints.recognise import base_layout, recognise_control
    from ldm.stable_diffusion import find

    checkpoint = open_checkpoint(find(source)[0])
    try:
        recognise_control(checkpoint)
    except CheckpointError:
        base_layout(checkpoint)  # its error says what else it is
        return "base"
    try:
        base_layout(checkpoint)
    except CheckpointError:
        return "control"
    raise ValueError(f'"{source}" holds a base and its ControlNet: say --part base, --part control or --part both')


def convert_base(args: argparse.Namespace) -> None:
    from tools.checkpoints import load_base, torch_dtype

    sd = load_base(args.source, torch_dtype(args.dtype), args.prediction, args.ema)
    with written(args.out, args.force) as path:
        sd.save(path, layout=layout_of(args.out))


def convert_control(args: argparse.Namespace) -> None:
    from tools.checkpoints import load_base, load_control, torch_dtype

    base = load_base(args.base).unet if args.base else None
    control = load_control(args.source, base, torch_dtype(args.dtype), args.global_average_pooling)
    if args.difference and control.encoder.config != base.config:
        raise ValueError(f'"{args.base}" is a base of another architecture than "{args.source}": give its own base')
    with written(args.out, args.force) as path:
        control.save(path, layout=layout_of(args.out), difference_to=base if args.difference else None)


def convert_both(args: argparse.Namespace) -> None:
    from tools.checkpoints import load_base, load_control, save_whole, torch_dtype

    if layout_of(args.out) != "ldm" or args.difference:
        raise ValueError("--part both is one file in the original layout: convert the base and the ControlNet apart")
    sd = load_base(args.source, torch_dtype(args.dtype), args.prediction, args.ema)
    control = load_control(
        args.source, dtype=torch_dtype(args.dtype), global_average_pooling=args.global_average_pooling
    )
    with written(args.out, args.force) as path:
        save_whole(path, sd, control)


if __name__ == "__main__":
    sys.exit(main())
