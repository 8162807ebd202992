"""Adds a fresh, untrained ControlNet to a base, in one file: what training begins with in the original repository.

    python -m tools.add_control sd15 --out control_sd15_ini.safetensors

The ControlNet is a copy of the base's encoder with zero convolutions: until it is trained it changes nothing. Our own
train.py makes this copy by itself; the file is for other programs (the original's is tool_add_control.py), and for
training several ControlNets from the same start.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # for `python tools/add_control.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.cli import add_output, check_output, layout_of, new_parser, run, written


def main(argv: list[str] | None = None) -> int:
    return run("add_control", add_control, parse_args(argv))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("add_control", __doc__)
    parser.add_argument("base", metavar="BASE", help="a file, a folder in diffusers' layout, or a preset (sd15, sd21)")
    group = parser.add_argument_group("base")
    group.add_argument("--prediction", choices=("eps", "v", "x0"), help="what it predicts (default: as found)")
    group.add_argument("--ema", action="store_true", help="the moving average in place of the UNet's weights")
    group = parser.add_argument_group("ControlNet")
    group.add_argument("--hint-channels", type=int, default=3, metavar="N", help="of its hints (default: %(default)s)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of its hint encoder, the only random part (default: %(default)s)",
    )
    add_output(parser)
    return parser.parse_args(argv)


def add_control(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    if layout_of(args.out) != "ldm":
        raise ValueError("a base with its ControlNet is one file in the original layout: end --out in .safetensors")
    if not 1 <= args.hint_channels <= 64:
        raise ValueError(f"--hint-channels is {args.hint_channels}, expected 1 to 64")
    import torch

    from controlnet import ControlNet
    from ldm.config import ControlConfig
    from tools.checkpoints import load_base, save_whole, torch_dtype

    sd = load_base(args.base, torch_dtype(args.dtype), args.prediction, args.ema)
    torch.manual_seed(args.seed)
    control = ControlNet.from_unet(sd.unet, ControlConfig(hint_channels=args.hint_channels))
    with written(args.out, args.force) as path:
        save_whole(path, sd, control.to(next(sd.unet.parameters()).dtype))


if __name__ == "__main__":
    sys.exit(main())
