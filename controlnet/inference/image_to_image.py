"""Image-to-image (SDEdit: Meng et al., arXiv 2108.01073) and inpainting: a picture made from another picture.

Shapes: H W pixels, h = H/8, w = W/8.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from controlnet.common.images import Size, described, resized, to_mask
from ldm.samplers import BeforeStep, Noise
from ldm.schedule import Schedule
from ldm.vae import Posterior


@dataclass(frozen=True)
class Init:
    """A picture to begin with: image-to-image, and with a mask inpainting.

    Raises ValueError for a strength outside [0, 1] and a mask of another size than the picture.
    """

    image: Image.Image  # RGB; it is brought to the size of the picture that is made
    strength: float = 0.75  # the part of the steps that is done: 0 keeps the picture, 1 begins from noise alone
    mask: Image.Image | None = None  # mode L, as large as `image`: white is made anew, black is kept

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"the strength is {self.strength}, expected 0 (nothing is changed) to 1 (begin from noise)"
            )
        if self.mask is not None and self.mask.size != self.image.size:
            raise ValueError(
                f"the mask is {described(self.mask.size[::-1])}, expected the picture's "
                f"{described(self.image.size[::-1])}"
            )

    def resized(self, size: Size) -> "Init":
        mask = None if self.mask is None else resized(self.mask, size)
        return replace(self, image=resized(self.image, size), mask=mask)


def steps_done(strength: float, steps: int) -> int:
    """As many as in the released code, int(strength steps), where a product that is whole does not lose one."""
    return int(round(strength * steps, 6))


class Start:
    """Where image-to-image begins: the picture as noisy as the first timestep that is done."""

    def __init__(self, init: Init, posterior: Posterior, scale: float, schedule: Schedule, timesteps: list[int]):
        """`posterior` is that of the picture's latents, `scale` the autoencoder's; `timesteps` are all."""
        self.init, self.posterior, self.scale, self.schedule = init, posterior, scale, schedule
        self.skip = len(timesteps) - steps_done(init.strength, len(timesteps))
        self.timesteps = timesteps[self.skip :]

    def begin(self, x: Tensor, noise: Noise) -> tuple[Tensor, BeforeStep | None]:
        """Unit noise x (1, 4, h, w) -> the x to begin with, and what keeps the known part in every step.

        The latents are a sample of the encoder's posterior, as in the released code. At strength 1 x stays noise, and
        only what is black in a mask counts.
        """
        z0 = self.scale * self.posterior.sample(noise(self.posterior.mean)).to(x)
        if not self.timesteps:
            x = z0
        elif self.init.strength < 1:
            x = self.schedule.q_sample(z0, torch.tensor(self.timesteps[:1], device=x.device), x)
        if self.init.mask is None:
            return x, None
        mask = to_mask(self.init.mask).to(x)
        return x, keep_known(self.schedule, z0, F.interpolate(mask, z0.shape[-2:], mode="area"), noise)


def keep_known(schedule: Schedule, z0: Tensor, mask: Tensor, noise: Noise) -> BeforeStep:
    """Inpainting by blending latents, as in the released DDIM sampler: before each step what is black in the mask
    (1, 1, h, w) is replaced by z0 (1, 4, h, w) with as much fresh noise as x has."""
    return lambda x, t: mask * x + (1 - mask) * schedule.q_sample(z0, t, noise(z0))
