"""Whether the ControlNet of a recipe does what its name says, on pairs that it was not trained on. Each figure stands
beside a floor, the same against the next pair, and a ceiling, the same for the true picture.

Images are uint8 (H, W, 3), errors are means in levels of 255. A measure takes an image and the sample it was made for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from controlnet import ControlNet
from controlnet.common.images import to_images
from controlnet.common.program import from_json
from controlnet.training.data import image_size
from controlnet.training.opening import open_sources
from controlnet.training.options import TrainSettings
from controlnet.training.previews import image_for
from controlnet.training.recipes import settings_of
from controlnet.training.run_state import RunFolder
from controlnet.training.sources import good_samples
from controlnet.worlds import WORLDS, Sample
from controlnet.worlds.measures import foreground, iou, palette_distance, psnr
from ldm import StableDiffusion
from tools.evaluate_scenes import compared

TOLD = 8  # levels by which before and after differ where something is to change


def report_recipe(sd: StableDiffusion, recipe: str, file: str, count: int, settings: dict) -> None:
    """Raises ValueError for a run of another recipe."""
    measure, samples = MEASURES[recipe], held_out(sd, recipe, Path(file), count)
    control = ControlNet.load(file, sd)
    asked = samples if measure.prompted else [replace(sample, caption="") for sample in samples]
    bar = tqdm(asked, leave=False, mininterval=2)
    images = [image_for(sd, control, sample, i, **settings) for i, sample in enumerate(bar)]
    figures = min(len(measure.of(sample.image, sample)) for sample in samples)  # what can be said of all
    shown = compared(lambda *one: measure.of(*one)[:figures], images, [sample.image for sample in samples], samples)
    lines = [f"{words} {text}" for words, text in zip(measure.words, shown, strict=False)]
    print(f"recipe {recipe}, {len(samples)} samples, {', '.join(lines)}")


def held_out(sd: StableDiffusion, recipe: str, file: Path, count: int) -> list[Sample]:
    """Validation pairs of the run that `file` is or lies in; of no run, those that the recipe would take."""
    run = RunFolder(file if file.is_dir() else file.parent)
    if run.settings_file.exists():
        settings = TrainSettings(**from_json(TrainSettings, run.written()["settings"], str(run.settings_file)))
        if settings.recipe != recipe:
            raise ValueError(f'"{run.path}" is no run of train.py --recipe {recipe}: give one, or its file alone')
    else:
        settings = TrainSettings(recipe=recipe, **settings_of(recipe, {}, sd.config.resolution))
    if settings.data in WORLDS:
        settings = replace(settings, validation=count)
    return list(islice(good_samples(open_sources(settings, image_size(settings.size, sd.config)).validation), count))


# ------------------------------------------------------------------------------------------------------------- measures


def tiled(image: np.ndarray, sample: Sample) -> tuple[float, float]:
    """What is seen at an eighth of the resolution is the hint's; what is not there yet is as sharp as in the picture:
    0 is the energy of the hint's gradients, 1 that of the true picture's."""
    blurred, sharp = gradient_energy(sample.hint), gradient_energy(sample.image)
    return psnr(eighth(image), eighth(sample.hint)), (gradient_energy(image) - blurred) / max(sharp - blurred, 1e-6)


def eighth(image: np.ndarray) -> Tensor:
    return F.avg_pool2d(to_images([image]), 8)


def gradient_energy(image: np.ndarray) -> float:
    return sum(float(np.square(np.diff(image.astype(float), axis=axis)).mean()) for axis in (0, 1))


def inpainted(image: np.ndarray, sample: Sample) -> tuple[float, ...]:
    """What is outside the hole stays, what is in it goes on; of a figure on a plain ground also the IoU in the hole."""
    hole = (sample.hint < 0).any(axis=2)
    errors = error(image, sample.image, ~hole), error(image, sample.image, hole)
    if sample.mask is None or sample.truth is not None:
        return errors
    return *errors, iou(foreground(image) & hole, sample.mask & hole)


def shuffled(image: np.ndarray, sample: Sample) -> tuple[float]:
    return (palette_distance(image, sample.hint),)


def edited(image: np.ndarray, sample: Sample) -> tuple[float, float, float]:
    """Where before (the hint) and after differ, the image is to be as after, elsewhere as before. Of the change nothing
    is made, 0, if the image is as before, and all, 1, if it is as after; below 0 it is farther from that."""
    before, after = sample.hint.astype(int), sample.image.astype(int)
    told = np.abs(after - before).max(axis=2) > TOLD
    nearer = np.linalg.norm(image - after, axis=2) < np.linalg.norm(image - before, axis=2)
    left = error(image, after, told) / max(error(before, after, told), 1e-6)
    return nearer[told].sum() / max(told.sum(), 1), 1 - left, error(image, before, ~told)


def error(image: np.ndarray, wanted: np.ndarray, where: np.ndarray) -> float:
    """0 where nothing is wanted."""
    return float(np.abs(image[where].astype(int) - wanted[where]).mean()) if where.any() else 0.0


@dataclass(frozen=True)
class Measure:
    of: Callable[[np.ndarray, Sample], tuple[float, ...]]
    words: tuple[str, ...]
    prompted: bool = True  # not where captions name what is measured, like colours


MEASURES = {
    "tile": Measure(tiled, ("PSNR to the hint at an eighth of the resolution", "share of the missing detail")),
    "inpaint": Measure(inpainted, ("error outside the hole", "inside", "IoU with the figure inside")),
    "shuffle": Measure(shuffled, ("distance of the palette to the hint's without a prompt",), prompted=False),
    "ip2p": Measure(edited, ("share of pixels changed as told", "of the change", "error elsewhere")),
}
