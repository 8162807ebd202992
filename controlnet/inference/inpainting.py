"""Inpainting bases (SD 1.5 and 2 "inpainting"): their UNet reads beside the latents what is known of the image.

Other bases inpaint by blending latents (`image_to_image.keep_known`). These were trained to fill holes, and nothing is
blended: as in the released code, x alone is sampled. ControlNets made for other bases get x, and go with them.
Shapes: B batch, H W pixels, h = H/8, w = W/8.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from controlnet.common.images import to_mask
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion

from .image_to_image import Init
from .offload import encode


def check_inpainting(config: Config, init: Init | None) -> None:
    """Raises ValueError for an inpainting base without an image and a mask."""
    if config.unet.inpainting and (init is None or init.mask is None):
        raise ValueError(
            f'the base "{config.name}" is an inpainting model, which fills what is masked in an image: give --init and '
            "--mask, or another base"
        )


def known_part(sd: StableDiffusion, init: Init, generators: list[Generator], tiled: bool) -> Tensor:
    """(B, 5, h, w): the mask, 1 where the image is made anew, and scaled latents of the image with gray in its place.

    As in the released code the mask is all or nothing, and each position of the latents has that of its first pixel.
    `init` is `resized`; for each generator the latents are a sample of the posterior.
    """
    mask = (to_mask(init.mask) >= 0.5).float()  # (1, 1, H, W)
    latents = encode(sd, init.pixels() * (1 - mask), generators, tiled)  # (B, 4, h, w)
    mask = F.interpolate(mask, latents.shape[-2:], mode="nearest").to(latents)
    return torch.cat([mask.expand(len(latents), -1, -1, -1), latents], dim=1)


def with_known(x: Tensor, part: Tensor | None) -> Tensor:
    """What an inpainting UNet reads, (B, 9, h, w); for others, where `part` is None, x (B, 4, h, w)."""
    return x if part is None else torch.cat([x, part.to(x.dtype)], dim=1)
