"""Image-to-image (SDEdit: Meng et al., arXiv 2108.01073) and inpainting: an image made from another image.

Most bases inpaint by blending latents (`keep_known`). Inpainting bases (SD 1.5 and 2 "inpainting") were trained to fill
holes: beside the latents their UNet reads what is known of the image (`known_part`), and nothing is blended. A
ControlNet reads the latents alone, so those made for other bases go with them.

Shapes: B batch, H W pixels, h = H/8, w = W/8.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageStat
from torch import Generator, Tensor

from controlnet.common.images import Size, fitted, resized, to_images, to_mask
from controlnet.common.program import FITS
from controlnet.hints.hint_image import as_mask, as_rgb
from ldm.config import Config
from ldm.samplers import BeforeStep, Noise
from ldm.schedule import Schedule
from ldm.stable_diffusion import StableDiffusion

from .offload import encode

Box = tuple[int, int, int, int]  # left, top, right, bottom: the first two are in it


@dataclass(frozen=True)
class Init:
    """An image to begin with: image-to-image, and with a mask inpainting.

    With `only_masked` N a part of the image is made, at the size of `generate`, and put back: what is white in the mask
    and N pixels around it. The result then has the image's own size.

    Raises ValueError for a strength outside [0, 1], `only_masked` or `mask_blur` without anything masked, and an
    unknown `fit`, and as `as_rgb` and `as_mask` do.
    """

    image: Image.Image  # RGB, or what `as_rgb` makes that of: it is resized to the size of the image that is made
    strength: float = 0.75  # the part of the steps that is done: 0 keeps the image, 1 begins from noise alone
    mask: Image.Image | None = None  # mode L or what `as_mask` takes: white is made anew, black is kept
    mask_blur: float = 0  # standard deviation in the image's pixels: makes the mask's edges soft
    only_masked: int | None = None
    fit: str = "stretch"  # how it is resized, as in `images.fitted`; what is padded is made anew

    def __post_init__(self):
        object.__setattr__(self, "image", as_rgb(self.image))
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"the strength is {self.strength}, expected 0 (nothing is changed) to 1 (begin from noise)"
            )
        if self.fit not in FITS:
            raise ValueError(f'fit is "{self.fit}", expected one of {", ".join(FITS)}')
        if self.mask is not None:
            object.__setattr__(self, "mask", as_mask(self.mask, self.image))
        if (self.only_masked is not None or self.mask_blur) and not (self.mask and self.mask.getbbox()):
            what = "only the masked part is to be made" if self.only_masked is not None else "the mask is to be soft"
            raise ValueError(f"{what}, but nothing is masked: give a mask with white in it")

    def pixels(self) -> Tensor:
        """(1, 3, H, W) in [-1, 1]"""
        return to_images([np.array(self.image)])

    @cached_property
    def soft_mask(self) -> Image.Image | None:
        """The mask with edges that fade outwards only: what is white may be a hole, of which nothing is to be kept."""
        if not self.mask_blur:
            return self.mask
        return ImageChops.lighter(self.mask, self.mask.filter(ImageFilter.GaussianBlur(self.mask_blur)))

    def box(self, size: Size | None = None) -> Box:
        """The part that is made. With `only_masked` it has the shape of `size` or, without one, sides of at most 2:1,
        as far as the image reaches."""
        if self.only_masked is None:
            return 0, 0, *self.image.size
        left, top, right, bottom = self.soft_mask.getbbox()
        width, height = right - left + 2 * self.only_masked, bottom - top + 2 * self.only_masked
        shape = size[1] / size[0] if size else min(max(width / height, 0.5), 2.0)
        width, height = max(width, round(height * shape)), max(height, round(width / shape))
        left, right = span((left + right) // 2, width, self.image.width)
        top, bottom = span((top + bottom) // 2, height, self.image.height)
        return left, top, right, bottom

    def part(self, image: Image.Image, size: Size | None = None) -> Image.Image:
        """The part that is made, cut from an image of the same view: a hint may be larger or smaller."""
        x, y = image.width / self.image.width, image.height / self.image.height
        box = self.box(size)
        left, top, right, bottom = (round(side * scale) for side, scale in zip(box, (x, y, x, y), strict=True))
        return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))

    def resized(self, size: Size) -> "Init":
        """The part that is made, and its mask, both of exactly `size`."""
        ground = tuple(map(round, ImageStat.Stat(self.image).mean)) if self.fit == "pad" else 0
        image = fitted(self.part(self.image, size), size, self.fit, ground)
        mask = self.mask and fitted(self.part(self.soft_mask, size), size, self.fit, ground=255)
        return Init(image, self.strength, mask)

    def put_back(self, image: Image.Image, begun: "Init") -> Image.Image:
        """The result: `image`, which was made from `begun`, and where the mask is black the original to the bit."""
        if self.mask is None:
            return image
        if self.only_masked is None:
            return Image.composite(image, begun.image, begun.mask)
        box, result = self.box(image.size[::-1]), self.image.copy()
        result.paste(resized(image, (box[3] - box[1], box[2] - box[0])), box, self.soft_mask.crop(box))
        return result


def span(middle: int, length: int, limit: int) -> tuple[int, int]:
    """The start and end of `length` pixels around `middle`, moved to lie between 0 and `limit`, or of all there are."""
    start = min(max(0, middle - length // 2), max(0, limit - length))
    return start, min(start + length, limit)


def steps_done(strength: float, steps: int) -> int:
    """As many as in Stable Diffusion's img2img.py, int(strength * steps), but none is lost to rounding the product."""
    return int(round(strength * steps, 6))


def begin(
    init: Init, z0: Tensor, x: Tensor, noise: Noise, schedule: Schedule, timesteps: list[float], blend: bool = True
) -> tuple[Tensor, BeforeStep | None]:
    """-> the x to begin with, and what keeps the known part at each step, if there is a mask and `blend` is set.

    z0 (B, 4, h, w) are the image's latents, samples of the encoder's posterior as in the released code; x is unit noise
    of their shape. The result is as noisy as the first of `timesteps`, which are those that are done. At strength 1 it
    is x, so that only what is black in the mask matters.
    """
    schedule = schedule.to(x.device)
    if init.strength < 1:
        x = schedule.q_sample(z0, torch.full((1,), timesteps[0], device=x.device), x)
    if init.mask is None or not blend:
        return x, None
    mask = F.interpolate(to_mask(init.mask).to(x), z0.shape[-2:], mode="area")
    return x, keep_known(schedule, z0, mask, noise)


def keep_known(schedule: Schedule, z0: Tensor, mask: Tensor, noise: Noise) -> BeforeStep:
    """Inpainting by blending latents, as in the released DDIM sampler: before each step what is black in the mask
    (1, 1, h, w) is replaced by z0 (B, 4, h, w) with fresh noise of the level of x."""
    return lambda x, t: mask * x + (1 - mask) * schedule.q_sample(z0, t, noise(z0))


# ----------------------------------------------------------------------------------------------------- inpainting bases


def check_inpainting(config: Config, init: Init | None) -> None:
    """Raises ValueError for an inpainting base without an image and a mask."""
    if config.unet.inpainting and (init is None or init.mask is None):
        raise ValueError(
            f'the base "{config.name}" is an inpainting model, which fills what is masked in an image: give --init and '
            "--mask, or another base"
        )


def known_part(sd: StableDiffusion, init: Init, generators: list[Generator], tiled: bool) -> Tensor:
    """(B, 5, h, w): the mask, 1 where the image is made anew, and scaled latents of the image with gray in its place.

    As in Stable Diffusion's inpaint_st.py the mask is 0 or 1, at each position of the latents that of its first pixel.
    `init` is already `resized`; for each generator the latents are a sample of the posterior.
    """
    mask = (to_mask(init.mask) >= 0.5).float()  # (1, 1, H, W)
    latents = encode(sd, init.pixels() * (1 - mask), generators, tiled)  # (B, 4, h, w)
    mask = F.interpolate(mask, latents.shape[-2:], mode="nearest").to(latents)
    return torch.cat([mask.expand(len(latents), -1, -1, -1), latents], dim=1)


def with_known(x: Tensor, part: Tensor | None) -> Tensor:
    """What the UNet reads: x alone, (B, 4, h, w), or in an inpainting base x with the known part, (B, 9, h, w)."""
    return x if part is None else torch.cat([x, part.to(x.dtype)], dim=1)
