"""A second pass for large images ("hires fix"): what a base makes far beyond the size that it was trained at repeats
itself, so it is made small, enlarged, and made anew in part."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from controlnet.common.images import Size, resized
from controlnet.guidance import Control
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion

from .generate import generate
from .image_to_image import Init
from .sizes import LARGEST_SIDE, check_size, size_multiple


def upscaled(
    sd: StableDiffusion,
    images: Sequence[Image.Image],
    factor: float,
    prompt: str,
    controls: Sequence[Control] = (),
    *,
    strength: float = 0.5,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """The images that `generate` made with the same prompt, controls, seed and settings, each `factor` times as large:
    enlarged with Lanczos, then changed by image-to-image with hints of the new size. Hints that are tensors are
    enlarged, others made anew. Raises ValueError as `larger_size` and `generate` do.
    """
    made = []
    for i, image in enumerate(images):
        size = larger_size(sd.config, image.size[::-1], factor)
        large = [enlarged(control.of_images(slice(i, i + 1)), size) for control in controls]
        init = Init(resized(image, size), strength)
        made += generate(sd, prompt, large, size=size, init=init, seed=seed + i, **settings)
    return made


def larger_size(config: Config, size: Size, factor: float) -> Size:
    """The size that the base can make nearest to `factor` times `size`. Raises ValueError for a factor below 1 and for
    a size that is too large."""
    if not 1 <= factor <= LARGEST_SIDE:
        raise ValueError(f"images are to become {factor} times as large, expected 1 (as they are) to {LARGEST_SIDE}")
    multiple = size_multiple(config)
    size = tuple(multiple * round(factor * side / multiple) for side in size)
    check_size(config, size)
    return size


def enlarged(control: Control, size: Size) -> Control:
    if not isinstance(control.hint, Tensor):
        return control
    hole = F.interpolate(control.hint, size, mode="nearest") < 0  # of an inpainting hint, all of -1
    hint = F.interpolate(control.hint.clamp(min=0), size, mode="bilinear", antialias=True)
    return replace(control, hint=hint.masked_fill(hole, -1))
