"""How the programs that measure models make their images, uint8 (H, W, 3)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from controlnet import Control, ControlNet
from controlnet.common.images import to_hints, to_images, to_pil
from controlnet.training.previews import images_of
from controlnet.worlds import Sample
from ldm import StableDiffusion

Paint = Callable[[Sequence[Sample]], list[np.ndarray]]
BATCH = 8  # images that are sampled at once: on two cores in three quarters of the time


def painter(sd: StableDiffusion, controls: Sequence[ControlNet], settings: dict) -> Paint:
    """-> a function of samples, which gives their images. With several `controls` a sample's hint holds theirs one
    after the other, three channels each.

    Without any prompt the hints take its place: they act in its branch alone, so that guidance strengthens them
    (arXiv 2302.05543v3, section 3.4).
    """

    def paint(samples: Sequence[Sample]) -> list[np.ndarray]:
        images, mode = [], "balanced" if any(sample.caption for sample in samples) else "prompt"
        for start in tqdm(range(0, len(samples), BATCH), leave=False):
            some = samples[start : start + BATCH]
            hints = np.split(np.stack([sample.hint for sample in some]), len(controls), axis=3)  # each (B, H, W, 3)
            acting = [Control.in_mode(net, to_hints(hint), mode) for net, hint in zip(controls, hints, strict=True)]
            images += images_of(sd, [sample.caption for sample in some], acting, seed=start, **settings)
        return images

    return paint


@torch.no_grad()
def after_autoencoder(sd: StableDiffusion, images: list[np.ndarray]) -> list[np.ndarray]:
    """One at a time: large images would not fit into memory together."""
    return [np.asarray(to_pil(sd.decode(sd.encode(to_images([one]), sample=False))[0])) for one in images]


def mismatched(items: list) -> list:
    """With each the next one, for a floor; empty where there is no other."""
    return items[1:] + items[:1] if len(items) > 1 else []
