"""Trains the TINY base model from scratch on the synthetic datasets together: scenes, people, shapes and circles.

    python -m tools.pretrain --out runs/base

Images are drawn, the autoencoder is trained on them, then the UNet and the text encoder on its latents. The result is
OUT/tiny.safetensors. A run can be stopped at any time: the same command continues from the last save, and step k
always sees the same images and the same noise. With --start an existing base is trained further; its autoencoder
stays, so its ControlNets still fit.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from controlnet.common.devices import use_device, use_precision
from controlnet.common.program import PRECISION_HELP, PRECISION_NAMES, count, new_parser, positive, positive_number
from controlnet.inference.sizes import check_seeds
from controlnet.training.identity import differences
from controlnet.training.run_state import write_text
from ldm.config import TINY
from ldm.stable_diffusion import StableDiffusion
from tools.cli import add_device, make_folder, run_tool
from tools.pretrain_common import log
from tools.pretrain_pictures import open_pictures
from tools.pretrain_unet import fresh_base, train_unet
from tools.pretrain_vae import train_vae


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.pretrain", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="the run's folder (default: %(default)s)")
    parser.add_argument("--seed", type=count, default=0, help="(default: %(default)s)")
    parser.add_argument("--start", type=Path, help="a base to train further (default: from scratch)")
    parser.add_argument("--pictures", type=positive, default=80000, help="to draw and train on (default: %(default)s)")
    cpus = "On CPUs bf16 is 1.5 times as fast with AVX512-BF16, twice with AMX, and many times slower without"
    precision_help = f"{PRECISION_HELP}. {cpus} (default: %(default)s)"
    parser.add_argument("--precision", choices=PRECISION_NAMES, default="fp32", help=precision_help)
    add_device(parser)
    vae = parser.add_argument_group("autoencoder")
    vae.add_argument("--vae-batch", type=positive, default=4, help="(default: %(default)s)")
    vae.add_argument("--vae-steps", type=positive, default=16000, help="(default: %(default)s)")
    vae.add_argument("--vae-lr", type=positive_number, default=2e-3, help="(default: %(default)s)")
    unet = parser.add_argument_group("UNet and text encoder")
    unet.add_argument("--unet-steps", type=positive, default=30000, help="(default: %(default)s)")
    unet.add_argument("--unet-batch", type=positive, default=64, help="(default: %(default)s)")
    unet.add_argument("--unet-lr", type=positive_number, default=1.5e-3, help="(default: %(default)s)")
    return run_tool(parser, argv, pretrain, stopped="the same command continues from the last save")


def pretrain(args: argparse.Namespace) -> None:
    check_seeds(args.seed, 1)
    make_folder(args.out, "--out")
    args.device = use_device(args.device)
    args.precision = use_precision(args.precision, args.device)
    start = StableDiffusion.load(args.start) if args.start else None
    pictures = open_pictures(args.out, TINY.resolution, args.pictures, args.seed)
    check_begun(args)
    torch.manual_seed(args.seed)  # after the drawing, which draws a random number, too, and which a resumed run skips
    sd = start or fresh_base(TINY, train_vae(TINY, pictures, args), pictures)
    sd = train_unet(sd.to(args.device), pictures, args)
    file = args.out / "tiny.safetensors"
    sd.save(file, torch.float16)
    log(args.out, f"wrote {file}")


def check_begun(args: argparse.Namespace) -> None:
    """Notes in OUT the seed and the start of a run. Raises ValueError if it was begun with others: what is kept there
    would be used all the same."""
    file, asked = args.out / "begun.json", {"seed": args.seed, "start": str(args.start or "scratch")}
    if not file.exists():
        write_text(file, json.dumps(asked))
    if found := differences(json.loads(file.read_text()), asked):
        raise ValueError(f"{args.out} holds another run ({found}): give another --out")


if __name__ == "__main__":
    sys.exit(main())
