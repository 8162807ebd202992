"""Adds a fresh, untrained ControlNet to a base, in one file: the starting point of training in the original repository.

    python -m tools.add_control sd15 --out control_sd15_ini.safetensors

The ControlNet is a copy of the base's encoder with zero convolutions: until it is trained, it changes nothing. Our
train.py makes this copy itself; the file is for other programs (it is what the original's tool_add_control.py writes),
and for training several ControlNets from the same start.
"""

import argparse
import sys

from controlnet.common.program import new_parser
from tools.cli import add_output, check_output, layout_of, run_tool, written


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.add_control", __doc__)
    parser.add_argument("base", metavar="BASE", help="a file, a folder in diffusers' layout, or a preset (sd15, sd21)")
    group = parser.add_argument_group("base")
    group.add_argument("--prediction", choices=("eps", "v", "x0"), help="what it predicts (default: as detected)")
    group.add_argument("--vae", metavar="FILE", help="in place of its autoencoder, or where it has none")
    group.add_argument("--zero-snr", action="store_true", help="it was trained with zero terminal SNR")
    group.add_argument("--ema", action="store_true", help="take the EMA of the UNet's weights")
    group = parser.add_argument_group("ControlNet")
    group.add_argument("--hint-channels", type=int, default=3, metavar="N", help="of its hints (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of its hint encoder (default: %(default)s)")
    add_output(parser)
    return run_tool(parser, argv, add_control)


def add_control(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    if layout_of(args.out) != "ldm":
        raise ValueError("a base with its ControlNet is one file in the original layout: end --out in .safetensors")
    if not 1 <= args.hint_channels <= 64:
        raise ValueError(f"--hint-channels is {args.hint_channels}, expected 1 to 64")
    import torch

    from controlnet import ControlNet
    from controlnet.common.devices import PRECISIONS
    from controlnet.config import ControlConfig
    from controlnet.inference.sizes import check_seeds
    from tools.checkpoints import load_base, save_whole

    check_seeds(args.seed, 1)
    described = dict(prediction=args.prediction, zero_snr=args.zero_snr, vae=args.vae)
    sd = load_base(args.base, PRECISIONS.get(args.dtype), args.ema, **described)
    torch.manual_seed(args.seed)
    control = ControlNet.from_unet(sd.unet, ControlConfig(hint_channels=args.hint_channels))
    with written(args.out, args.force) as path:
        save_whole(path, sd, control.to(next(sd.unet.parameters()).dtype))


if __name__ == "__main__":
    sys.exit(main())
