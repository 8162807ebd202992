"""Measures the small models on held-out pictures, prompts and hints of fill50k, with the floors that chance reaches.

python -m tools.evaluate
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python tools/evaluate.py`

from controlnet import ControlNet
from controlnet.colours import BASIC_COLOURS, COLOURS
from controlnet.generate import generate
from controlnet.guidance import Control
from controlnet.images import to_hints, to_images
from controlnet.measures import iou, nearest_colour, pooled_psnr, psnr, same_colour, split_disc
from controlnet.worlds import Fill50k, Sample
from ldm import StableDiffusion


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        sd = StableDiffusion.load(args.base)
        control = ControlNet.load(args.control, sd.unet) if args.control else None
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    settings = dict(steps=args.steps, cfg=args.cfg)
    print(f"{args.count} held-out samples each, {args.steps} DDIM steps, cfg {args.cfg}")
    report_vae(sd, args.count)
    for label, colours in ((f"{len(BASIC_COLOURS)} basic colours", BASIC_COLOURS), ("all colours", tuple(COLOURS))):
        report_colours(sd, label, colours, args.count, settings)
    if control is not None:
        report_control(sd, control, args.count, settings)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="a file or a preset (default: %(default)s)")
    parser.add_argument(
        "--control",
        type=Path,
        default=Path(__file__).parent.parent / "weights" / "tiny-fill50k.safetensors",
        help="a ControlNet's file (default: weights/tiny-fill50k.safetensors)",
    )
    parser.add_argument("--base-only", dest="control", action="store_const", const=None, help="no ControlNet")
    parser.add_argument("--count", type=int, default=64, help="samples of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of sampling (default: %(default)s)")
    parser.add_argument("--cfg", type=float, default=2.5, help="guidance (default: %(default)s)")
    return parser.parse_args(argv)


@torch.no_grad()
def report_vae(sd: StableDiffusion, count: int) -> None:
    """PSNR of encode -> decode, beside 8x8 average pooling with bilinear upsampling."""
    world = Fill50k(sd.config.resolution, held_out=True)
    images = to_images(world[i].image for i in range(count))
    decoded = sd.decode(sd.encode(images, sample=False)).clamp(-1, 1)
    print(f"autoencoder: {psnr(decoded, images):.2f} dB (8x8 average pooling: {pooled_psnr(images):.2f} dB)")


def report_colours(sd: StableDiffusion, label: str, colours: tuple[str, ...], count: int, settings: dict) -> None:
    """How often the base alone paints the colours of the prompt: the nearest of `colours` is the one asked for."""
    world = Fill50k(sd.config.resolution, colours=colours, held_out=True)
    samples = [world[i] for i in range(count)]
    right = np.array([colours_right(picture(sd, s, i, (), settings), s, colours) for i, s in enumerate(bar(samples))])
    disc, ground = right.mean(axis=0)
    both = right.all(axis=1).mean()
    chance = 1 / len(colours) ** 2
    print(f"base, {label}: both right {both:.0%} (chance {chance:.1%}), disc {disc:.0%}, ground {ground:.0%}")


def colours_right(image: np.ndarray, sample: Sample, colours: tuple[str, ...]) -> tuple[bool, bool]:
    disc_name, ground_name = sample.caption.removesuffix(" background").split(" circle with ")
    _, disc, ground = split_disc(image)
    return (
        same_colour(nearest_colour(disc, colours), disc_name),
        same_colour(nearest_colour(ground, colours), ground_name),
    )


def report_control(sd: StableDiffusion, control: ControlNet, count: int, settings: dict) -> None:
    """IoU of the painted discs with the hints' circles; the floor is the IoU with the next hint's circle."""
    world = Fill50k(sd.config.resolution, colours=BASIC_COLOURS, held_out=True)
    samples = [world[i] for i in range(count)]
    for label, prompted in (("with prompt", True), ("without", False)):
        masks, right = [], []
        for i, sample in enumerate(bar(samples)):
            shown = sample if prompted else Sample(sample.image, sample.hint, "", sample.mask)
            image = picture(sd, shown, i, [Control(control, to_hints([sample.hint]))], settings)
            masks.append(split_disc(image)[0])
            right.append(all(colours_right(image, sample, BASIC_COLOURS)))
        matched = np.mean([iou(mask, s.mask) for mask, s in zip(masks, samples, strict=True)])
        mismatched = np.mean([iou(mask, s.mask) for mask, s in zip(masks, samples[1:] + samples[:1], strict=True)])
        line = f"control, {label}: mean IoU {matched:.3f} (mismatched hints {mismatched:.3f})"
        print(line + (f", both colours right {np.mean(right):.0%}" if prompted else ""))


def picture(sd: StableDiffusion, sample: Sample, seed: int, controls, settings: dict) -> np.ndarray:
    return np.asarray(generate(sd, sample.caption, controls, seed=seed, **settings)[0])


def bar(samples: list[Sample]) -> tqdm:
    return tqdm(samples, leave=False, mininterval=2)


if __name__ == "__main__":
    sys.exit(main())
