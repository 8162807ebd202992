"""Measures the small models on validation images, prompts and hints, beside what chance would reach.

python -m tools.evaluate
python -m tools.evaluate --recipe tile runs/tile          # a run of train.py --recipe tile
"""

import argparse
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from controlnet import ControlNet
from controlnet.common.devices import use_device, use_precision
from controlnet.common.images import to_images
from controlnet.common.program import new_parser, not_negative, note, positive, share
from controlnet.inference.generate import generate
from controlnet.training.recipes import RECIPES
from controlnet.worlds import TINY_CONTROL_OF, WORLDS, Fill50k, People, Picture, Sample, Scenes, Seg, Shapes, World
from controlnet.worlds.colours import BASIC_COLOURS, COLOURS
from controlnet.worlds.controls import InTurn
from controlnet.worlds.hints import edges, scribble
from controlnet.worlds.measures import (
    colour_agreement,
    foreground,
    iou,
    keypoint_distance,
    nearest_colour,
    pooled_psnr,
    psnr,
    same_colour,
    split_disc,
)
from ldm import StableDiffusion
from ldm.checkpoints.published import WEIGHTS
from tools.cli import add_device, run_tool
from tools.evaluate_recipes import report_recipe
from tools.evaluate_scenes import report_prompts, report_scene_control, samples_of
from tools.judge import JUDGE, load_judge
from tools.paint import Paint, mismatched, painter


class PoseAndScribble(People):
    name = "pose with scribble"

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return np.dstack([super().hint(index, picture), scribble(picture, self.rng(index))])  # (H, W, 6)


class SegAndCanny(Seg):
    name = "seg with canny"

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return np.dstack([super().hint(index, picture), edges(picture)])  # (H, W, 6)


# Two controls at once, by the datasets that they are tried on alone.
TOGETHER = {("people", "scribble"): PoseAndScribble, ("seg", "canny"): SegAndCanny}


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.evaluate", __doc__)
    parser.add_argument("--base", default="tiny", help="a file or a preset (default: %(default)s)")
    tried = parser.add_mutually_exclusive_group()
    add = partial(tried.add_argument, action="append", nargs=2)
    datasets = f"the dataset to try a ControlNet on: {', '.join(WORLDS)}; repeatable (default: those in weights/)"
    add("--control", metavar=("DATASET", "FILE"), help=datasets)
    recipes = "a ControlNet of a recipe of train.py, on the validation pairs of its run, and nothing else; repeatable"
    add("--recipe", metavar=("RECIPE", "FILE"), help=recipes)
    tried.add_argument("--base-only", dest="control", action="store_const", const=[], help="no ControlNet")
    parser.add_argument("--count", type=positive, default=64, help="samples of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=20, help="of sampling (default: %(default)s)")
    parser.add_argument("--cfg", type=not_negative, default=2.5, help="classifier-free guidance (default: %(default)s)")
    parser.add_argument("--eta", type=share, default=0.0, help="of DDIM: 1 is as random as DDPM (default: 0)")
    add_device(parser)
    return run_tool(parser, argv, evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """Raises ValueError for an unknown dataset or recipe and for a file that cannot be used."""
    settings = dict(steps=args.steps, cfg=args.cfg, eta=args.eta)
    if args.recipe:
        check_names("recipe", args.recipe, RECIPES)
        sd = load_base(args)
        for recipe, file in args.recipe:
            report_recipe(sd, recipe, file, args.count, settings)
        return
    if args.control is None:
        files = [(world, WEIGHTS / f"{name}.safetensors") for world, name in TINY_CONTROL_OF.items()]
        args.control = [(world, file) for world, file in files if file.exists()]
    check_names("dataset", args.control, WORLDS)
    judge = load_judge() if JUDGE.exists() or any(has_scenes(WORLDS[world]) for world, _ in args.control) else None
    if judge is None:
        note(f"prompts of scenes are not measured: there is no {JUDGE.name} in weights/ (python -m tools.judge)")
    sd = load_base(args)
    controls = [(world, ControlNet.load(path, sd.unet)) for world, path in args.control]

    print(f"{args.count} held-out samples each, {args.steps} DDIM steps, eta {args.eta:g}, cfg {args.cfg}")
    for kind in (Fill50k, People, Shapes, Scenes):
        report_vae(sd, kind(sd.config.resolution, held_out=True), args.count)
    for label, colours in ((f"{len(BASIC_COLOURS)} basic colours", BASIC_COLOURS), ("all colours", tuple(COLOURS))):
        report_colours(sd, label, colours, args.count, settings)
    if judge:
        report_prompts(sd, judge, args.count, settings)
    by_name = dict(controls)
    tried = [(WORLDS[name], [control]) for name, control in controls]
    tried += [(kind, [by_name[n] for n in names]) for names, kind in TOGETHER.items() if by_name.keys() >= set(names)]
    for kind, nets in tried:
        world, paint = kind(sd.config.resolution, colours=BASIC_COLOURS, held_out=True), painter(sd, nets, settings)
        if has_scenes(kind):
            report_scene_control(sd, judge, world, paint, args.count)
        if not isinstance(world, Scenes):
            report_control(world, paint, args.count)


def check_names(kind: str, given: Iterable[Sequence[str]], known: Collection[str]) -> None:
    """Raises ValueError for an unknown one among the first words of `given`."""
    for name, _ in given:
        if name not in known:
            raise ValueError(f'there is no {kind} "{name}", expected one of {", ".join(known)}')


def load_base(args: argparse.Namespace) -> StableDiffusion:
    device = use_device(args.device)
    use_precision("fp32", device)
    return StableDiffusion.load(args.base, device)


def has_scenes(world: type[World]) -> bool:
    return issubclass(world, (Scenes, InTurn))


@torch.no_grad()
def report_vae(sd: StableDiffusion, world: World, count: int) -> None:
    """PSNR of encode -> decode, beside 8x8 average pooling with bilinear upsampling."""
    images = to_images(world.draw(i).image for i in range(count))
    decoded = sd.decode(sd.encode(images, sample=False)).clamp(-1, 1).cpu()
    print(
        f"autoencoder, {world.name}: {psnr(decoded, images):.2f} dB (8x8 average pooling: {pooled_psnr(images):.2f} dB)"
    )


def report_colours(sd: StableDiffusion, label: str, colours: tuple[str, ...], count: int, settings: dict) -> None:
    """How often the base alone paints the colours in the prompt, judged by the nearest of `colours`."""
    world = Fill50k(sd.config.resolution, colours=colours, held_out=True)
    samples = [world[i] for i in range(count)]
    bar = tqdm(samples, leave=False, mininterval=2)
    images = [np.asarray(generate(sd, s.caption, seed=i, **settings)[0]) for i, s in enumerate(bar)]
    right = np.array([colours_right(image, s, colours) for image, s in zip(images, samples, strict=True)])
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


def report_control(world: World, paint: Paint, count: int) -> None:
    """How well images follow their hints: the figures' IoU with the true ones and, for people, how far the key points
    are from the figure. In parentheses is the floor: the same against the next sample's figure, if there is one."""
    samples = samples_of(world, count, scenes=False)
    others = mismatched(samples)
    for prompts, prompted in (("with prompt", True), ("without", False)):
        shown = samples if prompted else [replace(sample, caption="") for sample in samples]
        images = paint(shown)
        masks = [foreground(image) for image in images]
        line = f"control, {world.name} {prompts}: mean IoU {figures_iou(masks, samples):.3f}"
        line += f" (mismatched {figures_iou(masks, others):.3f})" if others else ""
        if samples[0].keypoints is not None:
            line += f", key points {mean_distance(masks, samples):.1f} pixels away"
            line += f" ({mean_distance(masks, others):.1f})" if others else ""
        if prompted:
            agreement = [colour_agreement(i, s.image, s.mask) for i, s in zip(images, samples, strict=True)]
            line += f", colours right on {np.mean(agreement):.0%} of the figure"
        print(line)


def figures_iou(masks: list[np.ndarray], samples: list[Sample]) -> float:
    return float(np.mean([iou(mask, sample.mask) for mask, sample in zip(masks, samples, strict=True)]))


def mean_distance(masks: list[np.ndarray], people: list[Sample]) -> float:
    return float(np.mean([keypoint_distance(mask, s.keypoints) for mask, s in zip(masks, people, strict=True)]))


if __name__ == "__main__":
    sys.exit(main())
