"""From pictures to training batches: latents computed once, hints and captions drawn along.

Shapes: B batch, H W pixels, h = H/8, w = W/8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.stable_diffusion import StableDiffusion

from .images import to_hints, to_images
from .worlds import Sample


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, 4, h, w), scaled
    hints: Tensor  # (B, 3, H, W) in [0, 1]
    captions: list[str]


class LatentPairs:
    """The first `count` samples of a world as latents (count, 4, h, w), computed here, once, and captions.

    The posterior's mean stands for a sample of it: its deviation is some thousandths of the latents' own.
    """

    def __init__(self, samples: Sequence[Sample], count: int, sd: StableDiffusion, chunk: int = 32):
        self.samples = samples
        self.captions, latents = [], []
        for start in tqdm(range(0, count, chunk), desc="latents", mininterval=5):
            drawn = [samples[i] for i in range(start, min(start + chunk, count))]
            self.captions += [sample.caption for sample in drawn]
            with torch.no_grad():
                latents.append(sd.encode(to_images(sample.image for sample in drawn), sample=False).float().cpu())
        self.latents = torch.cat(latents)

    def draw(self, size: int, generator: torch.Generator) -> list[int]:
        """Random indices, with replacement: step k of a run needs no memory of the steps before it."""
        return torch.randint(len(self.latents), (size,), generator=generator).tolist()

    def batch(self, indices: list[int]) -> Batch:
        hints = to_hints(self.samples[i].hint for i in indices)
        return Batch(self.latents[indices], hints, [self.captions[i] for i in indices])


def drop_prompts(captions: list[str], share: float, generator: torch.Generator) -> list[str]:
    """Each caption replaced by "" with probability `share`.

    Half of them in ControlNet's training (section 3.3), so that it learns to read the hint's meaning without a prompt;
    a tenth in the base's, for classifier-free guidance.
    """
    dropped = torch.rand(len(captions), generator=generator) < share
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator of its own for, say, (seed, step): a resumed run then draws what an uninterrupted one would."""
    sequence = np.random.SeedSequence(numbers)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
