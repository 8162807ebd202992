"""What a ControlNet in training can do by now, on held-out pairs: their loss, and grids of what it makes of hints."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import default_collate

from controlnet.common.images import save_png, to_hints, to_images
from controlnet.guidance import Control
from controlnet.inference.generate import generate
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from controlnet.worlds import Sample
from controlnet.worlds.measures import foreground, iou, keypoint_distance
from ldm.stable_diffusion import StableDiffusion

from .data import Batch, Draws, Picture, Source
from .folders import BadSample
from .latent_cache import encoded, loss_inputs


def good_samples(source: Source) -> Iterator[Sample]:
    """All samples of a source but the bad ones."""
    for index in range(len(source)):
        try:
            yield source.sample(index)
        except BadSample as error:
            print(f"skipped: {error}")


class HeldOutLoss:
    """The loss on held-out samples, always with the same noise and the same timesteps, spread evenly: its values can be
    compared from step to step, where the loss in training jumps with the timesteps that were drawn."""

    def __init__(
        self, sd: StableDiffusion, samples: Sequence[Sample], draws: Draws, no_prompt: Tensor, batch_size: int
    ):
        self.inputs = []
        for start in range(0, len(samples), batch_size):
            items = []
            for number, sample in enumerate(samples[start : start + batch_size], start=start):
                drawn = draws(number)._replace(
                    t=torch.tensor(int((number + 0.5) / len(samples) * draws.timesteps)), dropped=torch.tensor(False)
                )
                picture = Picture(to_images([sample.image])[0], sample.caption)
                items.append(Batch(picture, to_hints([sample.hint])[0], drawn, torch.tensor(-1)))
            batch = default_collate(items)
            batch = batch._replace(content=encoded(sd, *batch.content))
            self.inputs.append(loss_inputs(sd, batch, no_prompt, no_prompt.device))

    @torch.no_grad()
    def __call__(self, loss: ControlLoss) -> float:
        sizes = [len(inputs[0]) for inputs in self.inputs]
        values = [loss(*inputs).item() for inputs in self.inputs]
        return float(np.average(values, weights=sizes))


class Preview:
    """Pictures for the hints of a few samples, always sampled with the same seeds: steps can be compared."""

    def __init__(self, sd: StableDiffusion, samples: Sequence[Sample], steps: int = 10):
        self.sd, self.samples, self.steps = sd, samples, steps

    def save(self, control: ControlNet, path: Path) -> dict[str, float]:
        """Writes the grid, a row for each sample, and returns the means of what `measured` says of the pictures."""
        rows, measures = [], []
        for seed, sample in enumerate(self.samples):
            picture = picture_for(self.sd, control, sample, seed, steps=self.steps)
            measures.append(measured(sample, picture))
            words = [sample.caption, *(f"{name} {value:.2f}" for name, value in measures[-1].items())]
            side = picture.shape[:2]
            rows.append(np.hstack([as_rgb(sample.hint), picture, sample.image, written(words, side)]))
        save_png(Image.fromarray(np.vstack(rows)), path, {})
        # a world of people and shapes has keypoints in some samples only
        names = dict.fromkeys(name for values in measures for name in values)
        return {name: float(np.mean([m[name] for m in measures if name in m])) for name in names}


def measured(sample: Sample, picture: np.ndarray) -> dict[str, float]:
    """How well a picture follows its hint, where the truth is known: in a world, not in a folder."""
    if sample.mask is None:
        return {}
    shown = foreground(picture)
    values = {"iou": iou(shown, sample.mask)}
    if sample.keypoints is not None:
        values["keypoint_distance"] = keypoint_distance(shown, sample.keypoints)
    return values


def picture_for(sd: StableDiffusion, control: ControlNet, sample: Sample, seed: int, **settings) -> np.ndarray:
    """One picture (H, W, 3), uint8, for a sample's hint and caption; `settings` are `generate`'s."""
    controls = [Control(control, to_hints([sample.hint]))]
    (picture,) = generate(sd, sample.caption, controls, seed=seed, **settings)
    return np.asarray(picture)


def as_rgb(hint: np.ndarray) -> np.ndarray:
    """A hint (H, W, C) as a picture (H, W, 3): of more channels than three the first ones, of fewer the mean."""
    if hint.shape[2] >= 3:
        return hint[..., :3]
    return hint.mean(axis=2, keepdims=True).astype(np.uint8).repeat(3, axis=2)


def written(paragraphs: list[str], size: tuple[int, int]) -> np.ndarray:
    """Text as a white picture of `size`, (H, W, 3)."""
    height, width = size
    picture = Image.new("RGB", (width, height), "white")
    points = max(9, height // 18)
    lines = [line for text in paragraphs for line in [*textwrap.wrap(text, max(1, int(width / points * 1.8))), ""]]
    ImageDraw.Draw(picture).multiline_text((4, 4), "\n".join(lines), "black", ImageFont.load_default(points))
    return np.asarray(picture)
