"""What a ControlNet in training can do by now: grids of hint | sample | target on held-out hints, and their IoU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.stable_diffusion import StableDiffusion

from .generate import generate
from .guidance import Control
from .images import save_png, to_hints
from .measures import iou, split_disc
from .model import ControlNet
from .worlds import Sample


class Preview:
    """The first `count` samples of a held-out world, always sampled with the same seeds: steps can be compared."""

    def __init__(self, sd: StableDiffusion, held_out: Sequence[Sample], count: int = 8, steps: int = 10):
        self.sd, self.steps = sd, steps
        self.samples = [held_out[i] for i in range(count)]

    def save(self, control: ControlNet, path: Path) -> float:
        """Writes the grid, a row for each sample, and returns the mean IoU of the discs with the hints' circles."""
        pictures = [
            picture_for(self.sd, control, sample, seed, steps=self.steps) for seed, sample in enumerate(self.samples)
        ]
        rows = [np.hstack([s.hint, picture, s.image]) for s, picture in zip(self.samples, pictures, strict=True)]
        save_png(Image.fromarray(np.vstack(rows)), path, {})
        masks = [split_disc(picture)[0] for picture in pictures]
        return float(np.mean([iou(mask, s.mask) for mask, s in zip(masks, self.samples, strict=True)]))


def picture_for(sd: StableDiffusion, control: ControlNet, sample: Sample, seed: int, **settings) -> np.ndarray:
    """One picture (H, W, 3), uint8, for a sample's hint and caption; `settings` are `generate`'s."""
    controls = [Control(control, to_hints([sample.hint]))]
    (picture,) = generate(sd, sample.caption, controls, seed=seed, **settings)
    return np.asarray(picture)
