"""Whether the ControlNet of a recipe does what its name says, on pairs that it was not trained on. Each figure stands
beside floors, from pictures that do not do it, and a ceiling: true pictures after the autoencoder, through which all
generated ones go.

Images are uint8 (H, W, 3), errors are means in levels of 255. A measure takes an image and the sample it was made for,
and leaves out figures that this sample cannot tell.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from controlnet import ControlNet
from controlnet.common.images import to_images
from controlnet.common.program import from_json
from controlnet.training.data import training_size
from controlnet.training.opening import open_sources
from controlnet.training.options import TrainSettings
from controlnet.training.recipes import settings_of
from controlnet.training.run_state import RunFolder
from controlnet.training.sources import good_samples
from controlnet.worlds import WORLDS, Sample
from controlnet.worlds.measures import foreground, iou, palette_distance, psnr
from ldm import StableDiffusion
from tools.paint import after_autoencoder, mismatched, painter

TOLD = 8  # levels: where before and after differ by more, something is to change
SHARPNESS = "sharpness (0 the hint's, 1 the picture's; noise raises it, too)"

Measure = Callable[[np.ndarray, Sample], dict[str, float]]


def report_recipe(sd: StableDiffusion, recipe: str, file: str, count: int, settings: dict) -> None:
    """Raises ValueError for a run of another recipe."""
    measure, samples = MEASURES[recipe], held_out(sd, recipe, Path(file), count)
    paint = painter(sd, [ControlNet.load(file, sd)], settings)
    # Captions of the synthetic datasets name colours, which are to be the hint's.
    images = paint([replace(sample, caption="") for sample in samples] if recipe == "shuffle" else samples)
    if recipe == "ip2p":
        beside = {
            "another instruction": measured(measure, paint(told_another(samples)), samples),
            "the hint itself": measured(measure, after_autoencoder(sd, [sample.hint for sample in samples]), samples),
        }
    elif others := mismatched(samples):
        beside = {"mismatched": measured(measure, images, others)}
        beside["mismatched"].pop(SHARPNESS, None)  # which any sharp picture has
    else:
        beside = {}
    beside["true pictures"] = measured(measure, after_autoencoder(sd, [sample.image for sample in samples]), samples)

    for name, values in measured(measure, images, samples).items():
        others = [f"{whose} {np.mean(figures[name]):.3f}" for whose, figures in beside.items() if name in figures]
        print(f"recipe {recipe}, {len(values)} samples, {name}: {np.mean(values):.3f} ({', '.join(others)})")


def measured(measure: Measure, images: Sequence[np.ndarray], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """For each figure its values, from the samples that can tell it."""
    values = defaultdict(list)
    for image, sample in zip(images, samples, strict=True):
        for name, value in measure(image, sample).items():
            values[name].append(value)
    return values


def told_another(samples: list[Sample]) -> list[Sample]:
    """Each sample with the next instruction that is not its own, or without any if all have the same."""
    asked = []
    for i, sample in enumerate(samples):
        following = [one.caption for one in samples[i + 1 :] + samples[:i] if one.caption != sample.caption]
        asked.append(replace(sample, caption=(following or [""])[0]))
    return asked


def held_out(sd: StableDiffusion, recipe: str, file: Path, count: int) -> list[Sample]:
    """Validation pairs of the run that `file` is or lies in; without a run, those that the recipe would take."""
    run = RunFolder(file if file.is_dir() else file.parent)
    if run.settings_file.exists():
        settings = TrainSettings(**from_json(TrainSettings, run.written()["settings"], str(run.settings_file)))
        if settings.recipe != recipe:
            raise ValueError(f'"{run.path}" is not a run of train.py --recipe {recipe}: give one, or its file alone')
    else:
        settings = TrainSettings(recipe=recipe, **settings_of(recipe, {}, sd.config.resolution))
    if settings.data in WORLDS:
        settings = replace(settings, validation=count)
    return list(islice(good_samples(open_sources(settings, training_size(settings.size, sd.config)).validation), count))


# ------------------------------------------------------------------------------------------------------------- measures


def tiled(image: np.ndarray, sample: Sample) -> dict[str, float]:
    """At an eighth of its resolution the image should be the picture, of which the hint shows no more (and shifts it:
    `tile` in controlnet/hints/filters.py). It should also be as sharp as the picture, by the energy of gradients."""
    blurred, sharp = gradient_energy(sample.hint), gradient_energy(sample.image)
    figures = {"PSNR to the picture at an eighth of its resolution": psnr(eighth(image), eighth(sample.image))}
    if sharp > blurred:
        figures[SHARPNESS] = (gradient_energy(image) - blurred) / (sharp - blurred)
    return figures


def eighth(image: np.ndarray) -> Tensor:
    return F.avg_pool2d(to_images([image]), 8)


def gradient_energy(image: np.ndarray) -> float:
    return sum(float(np.square(np.diff(image.astype(float), axis=axis)).mean()) for axis in (0, 1))


def inpainted(image: np.ndarray, sample: Sample) -> dict[str, float]:
    """What is outside the hole should stay and go on in it. If a figure on a plain ground reaches into the hole, also
    its IoU there."""
    hole = (sample.hint < 0).any(axis=2)
    figures = {
        "error outside the hole": error(image, sample.image, ~hole),
        "error in the hole": error(image, sample.image, hole),
    }
    if sample.mask is not None and sample.truth is None and (sample.mask & hole).any():
        figures["IoU with the figure in the hole"] = iou(foreground(image) & hole, sample.mask & hole)
    return figures


def shuffled(image: np.ndarray, sample: Sample) -> dict[str, float]:
    return {"distance of the palette to the hint's, without a prompt": palette_distance(image, sample.hint)}


def edited(image: np.ndarray, sample: Sample) -> dict[str, float]:
    """Where before (the hint) and after differ, the image should be as after, elsewhere as before. The share of the
    change is 0 if the image is as before and 1 if it is as after; below 0 it is farther from that."""
    before, after = sample.hint.astype(int), sample.image.astype(int)
    told = np.abs(after - before).max(axis=2) > TOLD
    figures = {}
    if told.any():
        nearer = np.linalg.norm(image - after, axis=2) < np.linalg.norm(image - before, axis=2)
        figures["share of pixels changed as told"] = float(nearer[told].mean())
        figures["share of the change"] = 1 - error(image, after, told) / error(before, after, told)
    if not told.all():
        figures["error elsewhere"] = error(image, before, ~told)
    return figures


def error(image: np.ndarray, wanted: np.ndarray, where: np.ndarray) -> float:
    return float(np.abs(image[where].astype(int) - wanted[where]).mean())


MEASURES: dict[str, Measure] = {"tile": tiled, "inpaint": inpainted, "shuffle": shuffled, "ip2p": edited}
