"""Image-to-image (SDEdit: Meng et al., arXiv 2108.01073) and inpainting: an image made from another image.

Shapes: H W pixels, h = H/8, w = W/8.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from controlnet.common.images import Size, resized, to_mask
from controlnet.hints.hint_image import check_mask
from ldm.samplers import BeforeStep, Noise
from ldm.schedule import Schedule


@dataclass(frozen=True)
class Init:
    """An image to begin with: image-to-image, and with a mask inpainting.

    Raises ValueError for a strength outside [0, 1] and a mask of another size than the image.
    """

    image: Image.Image  # RGB; it is resized to the size of the image that is made
    strength: float = 0.75  # the part of the steps that is done: 0 keeps the image, 1 begins from noise alone
    mask: Image.Image | None = None  # mode L, as large as `image`: white is made anew, black is kept

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"the strength is {self.strength}, expected 0 (nothing is changed) to 1 (begin from noise)"
            )
        if self.mask is not None:
            check_mask(self.mask, self.image)

    def resized(self, size: Size) -> "Init":
        mask = None if self.mask is None else resized(self.mask, size)
        return replace(self, image=resized(self.image, size), mask=mask)


def steps_done(strength: float, steps: int) -> int:
    """As many as in the released code, int(strength steps), except that no step is lost to rounding of the product."""
    return int(round(strength * steps, 6))


def begin(
    init: Init, z0: Tensor, x: Tensor, noise: Noise, schedule: Schedule, timesteps: list[int]
) -> tuple[Tensor, BeforeStep | None]:
    """-> the x to begin with, and what keeps the known part at each step, if there is a mask.

    z0 (1, 4, h, w) are the image's latents, a sample of the encoder's posterior as in the released code; x is unit
    noise of their shape. The result is as noisy as the first of `timesteps`, those that are done; at strength 1 it is
    x, and only what is black in the mask counts.
    """
    if not timesteps:
        x = z0
    elif init.strength < 1:
        x = schedule.q_sample(z0, torch.tensor(timesteps[:1], device=x.device), x)
    if init.mask is None:
        return x, None
    mask = F.interpolate(to_mask(init.mask).to(x), z0.shape[-2:], mode="area")
    return x, keep_known(schedule, z0, mask, noise)


def keep_known(schedule: Schedule, z0: Tensor, mask: Tensor, noise: Noise) -> BeforeStep:
    """Inpainting by blending latents, as in the released DDIM sampler: before each step what is black in the mask
    (1, 1, h, w) is replaced by z0 (1, 4, h, w) with fresh noise of the level of x."""
    return lambda x, t: mask * x + (1 - mask) * schedule.q_sample(z0, t, noise(z0))
