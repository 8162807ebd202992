"""What the experiments share: trainings, each done once, the pictures that are sampled, and what these are measured by.

Images are uint8 (H, W, 3).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from controlnet import Control, ControlNet
from controlnet.common.devices import use_device, use_precision
from controlnet.common.images import to_hints
from controlnet.training.latent_cache import ends_of_weights
from controlnet.training.previews import images_of, text_image
from controlnet.worlds import Fill50k, Sample
from controlnet.worlds.colours import BASIC_COLOURS
from controlnet.worlds.measures import foreground, iou
from ldm import StableDiffusion
from ldm.checkpoints.files import new_file
from tools.evaluate import colours_right

from .runs import Run, trained
from .statistics import Numbers

BATCH, VALIDATION = 16, 16  # images
WATCHED = 8  # of the validation images, sampled all along
OPTIMIZER, LR, WARMUP = "muon", 1e-3, 50
SHOWN = 6  # images in a row of a sheet
SIDE, WORDS = 80, 110  # pixels of an image there, and of the label before its row


@dataclass(frozen=True)
class Scale:
    seeds: int
    steps: int  # of a training
    images: int  # that it sees again and again
    samples: int  # that are measured
    sampling_steps: int


FULL = Scale(seeds=3, steps=300, images=2000, samples=16, sampling_steps=10)
QUICK = Scale(seeds=1, steps=20, images=200, samples=6, sampling_steps=10)


@dataclass(frozen=True)
class Lab:
    out: Path
    scale: Scale
    base: str
    precision: str
    device: torch.device

    @cached_property
    def sd(self) -> StableDiffusion:
        return StableDiffusion.load(self.base, self.device)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the base's weights: another base may have the same name."""
        return ends_of_weights(self.sd.unet)[:8]

    @property
    def settings(self) -> dict:
        """Numbers on disk are measured again unless they were measured with the same settings."""
        scale = vars(self.scale)
        return {**scale, "base": Path(self.base).stem, "fingerprint": self.fingerprint, "precision": self.precision}

    # -------------------------------------------------------------------------------------------------- trainings

    def train(self, seed: int, **settings) -> Run:
        """A training with these settings, by their names in train.py, in place of those here.

        The one with none, a full ControlNet on circles, is part of most experiments, and its images are measured all
        along. Raises ValueError if it fails, KeyboardInterrupt if it is stopped.
        """
        steps = settings.get("steps", self.scale.steps)
        every = max(steps // 15, 5)
        watched = dict(sample_count=0)
        if not settings:  # watched twice as often: how suddenly control sets in shows no finer than this
            watched = dict(sample_count=WATCHED, sample_every=every // 2, validate_every=every // 2)
        defaults = dict(
            data="fill50k",
            images=self.scale.images,
            steps=steps,
            batch_size=BATCH,
            optimizer=OPTIMIZER,
            lr=LR,
            # As the authors': when control sets in must not depend on when a run ends, nor may the warm-up.
            lr_schedule="constant",
            warmup=WARMUP,
            validation=VALIDATION,
            validate_every=every,
            precision=self.precision,
            base=self.base,
        )
        settings = {**defaults, **settings, **watched, "seed": seed}
        return trained(self.out / "runs", settings, self.fingerprint, str(self.device))

    def over_seeds(self, measure: Callable[[int], dict[str, dict[str, float]]]) -> Numbers:
        """`measure(seed)` gives measures by their names, for each row of a table -> each a list over the seeds."""
        found = [measure(seed) for seed in range(self.scale.seeds)]
        return {row: {name: [one[row][name] for one in found] for name in found[0][row]} for row in found[0]}

    def drawn_over_seeds(
        self,
        name: str,
        draw: Callable[[int], dict[str, list[np.ndarray]]],
        measure: Callable[[list[np.ndarray]], dict[str, float]],
        given: dict[str, list[np.ndarray]] | None = None,
    ) -> Numbers:
        """`over_seeds` of what `measure` says of the images that `draw(seed)` gives for each row. Those of the first
        seed are shown in OUT/`name`.jpg, below what is `given`: the hints of `circles`, if nothing else is."""
        above = {"hints": [sample.hint for sample in self.circles]} if given is None else given

        def of_seed(seed: int) -> dict[str, dict[str, float]]:
            drawn = draw(seed)
            if seed == 0:
                save_sheet(self, name, {**above, **drawn})
            return {row: measure(images) for row, images in drawn.items()}

        return self.over_seeds(of_seed)

    # --------------------------------------------------------------------------------------------------- pictures

    def load(self, run: Run) -> ControlNet:
        return ControlNet.load(run.control, self.sd)

    @cached_property
    def world(self) -> Fill50k:
        """Circles that no training has seen, in colours that everybody can tell apart."""
        return Fill50k(self.sd.config.resolution, colours=BASIC_COLOURS, held_out=True)

    @cached_property
    def circles(self) -> list[Sample]:
        return [self.world[i] for i in range(self.scale.samples)]

    def draw(
        self,
        controls: Sequence[tuple[ControlNet, Sequence[np.ndarray]]],
        prompts: Sequence[str],
        sd: StableDiffusion | None = None,
        mode: str = "balanced",
        cfg: float | None = None,
    ) -> list[np.ndarray]:
        """An image for each prompt, from as many hints for each ControlNet; always with the same seeds."""
        acting = [Control.in_mode(net, to_hints(hints).to(self.device), mode) for net, hints in controls]
        return images_of(sd or self.sd, prompts, acting, seed=0, steps=self.scale.sampling_steps, cfg=cfg)

    def draw_circles(self, net: ControlNet, prompts: Sequence[str] | None = None, **how) -> list[np.ndarray]:
        """Images for the hints of `circles`, without prompts if none are given."""
        hints = [sample.hint for sample in self.circles]
        return self.draw([(net, hints)], [""] * len(hints) if prompts is None else prompts, **how)


def open_lab(args: argparse.Namespace) -> Lab:
    """Raises ValueError for a device that is not there."""
    scale = QUICK if args.quick else FULL
    device = use_device(args.device)
    use_precision("fp32", device)
    return Lab(args.out, replace(scale, seeds=args.seeds or scale.seeds), args.base, args.precision, device)


# ------------------------------------------------------------------------------------------------- pictures of circles


def circles_measured(images: Sequence[np.ndarray], circles: Sequence[Sample]) -> dict[str, float]:
    """How well the discs follow their hints, and the share of images in which both colours are those of the captions,
    whether these were given as prompts or not."""
    pairs = list(zip(images, circles, strict=True))
    right = [all(colours_right(image, sample, BASIC_COLOURS)) for image, sample in pairs]
    return {"iou": follows(images, circles), "colours": float(np.mean(right))}


def follows(images: Sequence[np.ndarray], samples: Sequence[Sample]) -> float:
    """The mean IoU of the figures that are seen with those that the hints show."""
    return float(np.mean([iou(foreground(i), s.mask) for i, s in zip(images, samples, strict=True)]))


# --------------------------------------------------------------------------------------------------- sheets of samples


def save_sheet(lab: Lab, name: str, rows: dict[str, Sequence[np.ndarray]]) -> None:
    """OUT/NAME.jpg: the first six images of each row, none picked, beside its label."""
    lines = []
    for label, images in rows.items():
        shown = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE))) for image in images[:SHOWN]]
        lines.append(np.hstack([text_image([label], (SIDE, WORDS)), *shown]))
    with new_file(lab.out / f"{name}.jpg") as temporary:
        Image.fromarray(np.vstack(lines)).save(temporary, "JPEG", quality=80)
