"""What is reported while images are made."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from controlnet.common.program import note
from ldm.samplers import OnStep

SECONDS_BETWEEN_LINES = 30  # where there is no terminal


@dataclass(frozen=True)
class Progress:
    """What the callback of `generate` is told after each step of each image."""

    image: int  # which of this call's `count`, from 0
    step: int  # how many of `steps` are done
    steps: int
    x: Tensor = field(repr=False)  # the latents (1, 4, h, w), fp32
    x0: Tensor = field(repr=False)  # the data that this step predicts, like x
    decode: Callable[[Tensor], Image.Image] = field(repr=False)  # of latents (1, 4, h, w)

    @torch.no_grad()
    def preview(self, side: int = 256) -> Image.Image:
        """x0 as an RGB image whose longer side has less than twice `side` pixels: its latents are averaged, then
        decoded. Nothing is decoded before this is called."""
        factor = max(1, 8 * max(self.x0.shape[-2:]) // side)
        return self.decode(F.avg_pool2d(self.x0, factor))


def reporter(
    bar: tqdm, callback: Callable[[Progress], None] | None, first: int, steps: int, decode: Callable
) -> OnStep:
    """-> what the sampler calls after each step of a batch, whose first image is `first`."""

    def on_step(step: int, x: Tensor, x0: Tensor) -> None:
        bar.update(len(x))
        if callback:
            for i, (one, one_x0) in enumerate(zip(x.split(1), x0.split(1), strict=True), first):
                callback(Progress(i, step + 1, steps, one, one_x0, decode))

    return on_step


@contextmanager
def shown(total: int) -> Iterator[Callable[[], None]]:
    """-> what is to be called after each step. It shows a bar on a terminal, elsewhere a line now and then."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit="step") as bar:
            yield bar.update
        return
    done, begun = 0, time.monotonic()
    said = begun

    def step() -> None:
        nonlocal done, said
        done, now = done + 1, time.monotonic()
        if done < total and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            note(f"step {done} of {total}, about {(now - begun) / done * (total - done) / 60:.1f} minutes left")

    yield step
