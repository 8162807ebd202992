"""Sizes, seeds and the other numbers of `generate`: their defaults, and which are refused.

Sizes are (height, width) in pixels. Shapes: H W pixels, h = H/8, w = W/8.
"""

import math
from collections.abc import Sequence
from numbers import Integral

from PIL import Image
from torch import Tensor

from controlnet.common.images import Size, fitted_size, size_text
from controlnet.guidance import Control
from controlnet.hints.hint_image import HintImage
from ldm.config import Config

from .image_to_image import Init

LARGEST_SIDE = 8192  # pixels: guards against typos that exhaust time and memory
SEEDS = 2**32  # PyTorch's generator on the CPU reads 32 bits: that many later its numbers are the same again


def default_cfg(config: Config) -> float:
    """The released Stable Diffusion's default, and less for the small base."""
    return 2.5 if config.name == "tiny" else 7.5


def size_multiple(config: Config) -> int:
    """Both sides of an image must be multiples of this, 64 for SD: the VAE divides them by 8, and the UNet halves them
    between its levels and has to come back to the same size."""
    return config.vae.downscale * 2 ** (len(config.unet.multipliers) - 1)


def default_size(config: Config, image: Image.Image | None = None) -> Size:
    """The model's resolution, as a square or, as its short side, in the aspect ratio of `image`."""
    if image is None:
        return config.resolution, config.resolution
    return fitted_size(image, config.resolution, size_multiple(config))


def image_size(config: Config, controls: Sequence[Control], size: Size | None, init: Init | None = None) -> Size:
    """`size`, or the default that `generate` describes. Raises TypeError for what is not a size, ValueError for one
    that the model cannot make or that is not the size of a hint that is a tensor."""
    if size is not None:
        if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, Integral) for side in size):
            raise TypeError(f"the size is {size!r}, expected (height, width) in pixels")
        size = int(size[0]), int(size[1])
    hints = [control.hint for control in controls]
    sizes = [tuple(hint.shape[-2:]) for hint in hints if isinstance(hint, Tensor)]
    images = [init.part(init.image)] if init else []
    images += [hint.image for hint in hints if isinstance(hint, HintImage)]
    size = size or next(iter(sizes), None) or default_size(config, next(iter(images), None))
    check_size(config, size)
    for found in sizes:
        if found != size:
            raise ValueError(f"a hint is {size_text(found)}, expected the image's {size_text(size)}: resize it")
    return size


def latent_shape(config: Config, size: Size) -> tuple[int, int, int]:
    """(4, h, w)"""
    return config.unet.latent_channels, *(side // config.vae.downscale for side in size)


def check_size(config: Config, size: Size) -> None:
    """Raises ValueError if the model cannot make images of this size."""
    multiple = size_multiple(config)
    if any(not multiple <= side <= LARGEST_SIDE for side in size) or any(side % multiple for side in size):
        nearest = tuple(min(max(1, round(side / multiple)) * multiple, LARGEST_SIDE) for side in size)
        raise ValueError(
            f"the image's size is {size_text(size)}, expected multiples of {multiple} up to {LARGEST_SIDE}: take "
            f"{size_text(nearest)}"
        )


def check_cfg(cfg: float) -> None:
    """Raises ValueError for a number that cannot be a guidance scale."""
    if not 0 <= cfg < math.inf:
        raise ValueError(
            f"the guidance (cfg) is {cfg}, expected 0 (the negative prompt alone), 1 (the prompt alone) or more: "
            "exchange the two prompts to move away from the prompt"
        )


def check_seeds(seed: int, count: int) -> None:
    """Raises TypeError for what is not a whole number, ValueError if an image's would not be below `SEEDS`."""
    if not isinstance(seed, Integral):
        raise TypeError(f"the seed is {seed!r}, expected a whole number")
    last = SEEDS - max(1, count)
    if last < 0:
        raise ValueError(f"the number of images is {count}, more than there are seeds: take fewer")
    if not 0 <= seed <= last:
        raise ValueError(f"the seed is {seed}, expected 0 to {last}: take {min(seed % SEEDS, last)}")


def check_batch_size(batch_size: int | None) -> None:
    """Raises ValueError for less than one image at once."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}, expected 1 (one image after the other) or more")
