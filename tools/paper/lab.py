"""What the experiments share: trainings, each done once, the pictures that are sampled, and what these are measured by.

Images are uint8 (H, W, 3).
"""

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from controlnet import Control, ControlNet
from controlnet.common.devices import use_device, use_precision
from controlnet.common.images import to_hints
from controlnet.common.program import flag_of, note
from controlnet.guidance import MODES, layer_weights
from controlnet.training.latent_cache import ends_of_weights
from controlnet.training.previews import images_of
from controlnet.training.run_state import RunFolder
from controlnet.worlds import Fill50k, Sample
from controlnet.worlds.colours import BASIC_COLOURS
from controlnet.worlds.measures import foreground, iou
from ldm import StableDiffusion
from tools.evaluate import colours_right

from .statistics import Numbers

TRAIN = Path(__file__).parents[2] / "train.py"
BATCH, VALIDATION = 16, 16  # images
WATCHED = 8  # of the validation images, sampled all along


@dataclass(frozen=True)
class Scale:
    """How much is done."""

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
        """Of the base's weights: another one may have its name."""
        return ends_of_weights(self.sd.unet)[:8]

    @property
    def settings(self) -> dict:
        """By which numbers are known to be those of this call."""
        scale = vars(self.scale)
        return {**scale, "base": Path(self.base).stem, "fingerprint": self.fingerprint, "precision": self.precision}

    # -------------------------------------------------------------------------------------------------- trainings

    def train(self, seed: int, **settings) -> "Trained":
        """The run of train.py with these settings, by their names there, trained as far as it is not.

        The one without any, a full ControlNet on circles, is part of most experiments, and its images are measured all
        along. Raises ValueError if the training fails, KeyboardInterrupt if it is stopped.
        """
        steps = settings.get("steps", self.scale.steps)
        every = max(steps // 15, 5)
        watched = dict(sample_every=every, sample_count=WATCHED) if not settings else dict(sample_count=0)
        defaults = dict(
            data="fill50k",
            images=self.scale.images,
            steps=steps,
            batch_size=BATCH,
            optimizer="muon",
            lr=1e-3,
            lr_schedule="cosine",
            warmup=max(steps // 6, 1),
            validation=VALIDATION,
            validate_every=every,
            precision=self.precision,
            base=self.base,
        )
        settings = {**defaults, **settings, **watched, "seed": seed}
        settings = {name: value for name, value in settings.items() if value is not None}
        run = Trained(self.out / "runs" / self.name_of(settings), steps, seed)
        if not run.control.exists():
            call(run.folder, settings, self.cache_of(settings), self.device)
            shutil.rmtree(run.folder.path / "state")  # by which it would go on: large, and of no more use
        return run

    def name_of(self, settings: dict) -> str:
        """Readable where trainings differ most, with a hash of all that they depend on."""
        kind = settings.get("architecture", "full")
        given = hash_of([{**settings, "base": self.fingerprint}])
        return f"{settings['data']}-{kind}-{settings['seed']}-{given}"

    def cache_of(self, settings: dict) -> Path | None:
        """Latents that trainings on the same images share."""
        if settings.get("no_cache"):
            return None
        name = f"latents-{settings['data']}-{settings['images']}-{settings['seed']}-{self.fingerprint}"
        return self.out / "runs" / name

    def over_seeds(self, measure: Callable[[int], dict[str, dict[str, float]]]) -> Numbers:
        """`measure(seed)` gives measures by their names, for each row of a table -> each a list over the seeds."""
        found = [measure(seed) for seed in range(self.scale.seeds)]
        return {row: {name: [one[row][name] for one in found] for name in found[0][row]} for row in found[0]}

    # --------------------------------------------------------------------------------------------------- pictures

    def load(self, run: "Trained") -> ControlNet:
        return ControlNet.load(run.control, self.sd)

    @cached_property
    def circles(self) -> list[Sample]:
        """The first that no training has seen, in colours that everybody can tell apart."""
        world = Fill50k(self.sd.config.resolution, colours=BASIC_COLOURS, held_out=True)
        return [world[i] for i in range(self.scale.samples)]

    def draw(
        self,
        controls: Sequence[tuple[ControlNet, Sequence[np.ndarray]]],
        prompts: Sequence[str],
        sd: StableDiffusion | None = None,
        mode: str = "balanced",
        cfg: float | None = None,
    ) -> list[np.ndarray]:
        """An image for each prompt, from as many hints for each ControlNet; always with the same seeds."""
        acting = [control_of(net, to_hints(hints).to(self.device), mode) for net, hints in controls]
        return images_of(sd or self.sd, prompts, acting, seed=0, steps=self.scale.sampling_steps, cfg=cfg)

    def draw_circles(self, net: ControlNet, prompts: Sequence[str] | None = None, **how) -> list[np.ndarray]:
        """For the hints of `circles`: without prompts, if none are given."""
        hints = [sample.hint for sample in self.circles]
        return self.draw([(net, hints)], [""] * len(hints) if prompts is None else prompts, **how)


def hash_of(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def open_lab(args: argparse.Namespace) -> Lab:
    """Raises ValueError for a device that is not there."""
    scale = QUICK if args.quick else FULL
    device = use_device(args.device)
    use_precision("fp32", device)
    return Lab(
        args.out, Scale(**{**vars(scale), "seeds": args.seeds or scale.seeds}), args.base, args.precision, device
    )


# ------------------------------------------------------------------------------------------------------------ trainings


@dataclass(frozen=True)
class Trained:
    path: Path
    steps: int
    seed: int

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def control(self) -> Path:
        """Written with the last step's state: who finds it needs to train no more."""
        return self.folder.control_at(self.steps)

    def log(self) -> list[dict]:
        return list(self.folder.logged())

    def seconds_per_step(self) -> float:
        """The median: some steps are held up by validations."""
        return BATCH / median(line["images_per_second"] for line in self.log())


def call(run: RunFolder, settings: dict, cache: Path | None, device: torch.device) -> None:
    """train.py with these settings. A run that was stopped goes on."""
    if run.states():
        options = ["--resume"]
    else:
        options = [word for name, value in settings.items() for word in words_of(name, value)]
    where = ["--out", str(run.path), "--device", str(device), "--keep", "1", "--save-every", "10m"]
    where += ["--cache", str(cache)] if cache else []
    note(f"training {run.path}")
    if status := launch([*options, *where]):
        raise ValueError(f"train.py ended with status {status}, its own words are above: the same command goes on")


def launch(argv: list[str]) -> int:
    """train.py as a program of its own, whose words go to the terminal -> its exit status."""
    command = [sys.executable, str(TRAIN), *argv]
    with subprocess.Popen(command, stdout=sys.stderr, start_new_session=True) as training:
        try:
            return training.wait()
        except KeyboardInterrupt:
            training.send_signal(signal.SIGINT)  # alone: it saves after its step, and a second one would hurry it
            training.wait()
            raise


def words_of(name: str, value: object) -> list[str]:
    return [flag_of(name)] if value is True else [flag_of(name), str(value)]


# ------------------------------------------------------------------------------------------------- pictures of circles


def control_of(net: ControlNet, hints: Tensor, mode: str) -> Control:
    """hints (B, 3, H, W)"""
    weights = layer_weights(mode, (), net.encoder.config)
    return Control(net, hints, layers=weights, prompt_only=MODES[mode].prompt_only)


def circles_measured(images: Sequence[np.ndarray], circles: Sequence[Sample]) -> dict[str, float]:
    """How well the discs follow their hints, and the share of images in which both colours are those of the captions,
    whether these were given as prompts or not."""
    pairs = list(zip(images, circles, strict=True))
    right = [all(colours_right(image, sample, BASIC_COLOURS)) for image, sample in pairs]
    return {"iou": follows(images, circles), "colours": float(np.mean(right))}


def follows(images: Sequence[np.ndarray], samples: Sequence[Sample]) -> float:
    """The mean IoU of the figures that are seen with those that the hints show."""
    return float(np.mean([iou(foreground(i), s.mask) for i, s in zip(images, samples, strict=True)]))
