"""From a prompt and hints to pictures, in one call.

    sd = StableDiffusion.load("sd15")
    net = ControlNet.load("weights/control_sd15_canny.safetensors", sd.unet)
    image = read_image("edges.png")
    hint = make_hint(image, default_size(sd.config, image))
    pictures = generate(sd, "a bird", [Control(net, hint)], count=4)

Sizes are (height, width) in pixels. Shapes: H W pixels, h = H/8, w = W/8.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.config import Config
from ldm.samplers import Denoise, OnStep, sample
from ldm.stable_diffusion import StableDiffusion

from .guidance import Control, guided
from .images import Size, fitted_size, resized, to_hints, to_picture

# The guidance when none is asked for: the released Stable Diffusion's default, and less for the small base.
DEFAULT_CFG = 7.5
DEFAULT_CFG_OF = {"tiny": 2.5}


def default_cfg(config: Config) -> float:
    return DEFAULT_CFG_OF.get(config.name, DEFAULT_CFG)


def size_multiple(config: Config) -> int:
    """What both sides of a picture must be a multiple of: 64 for SD. The VAE makes it 8 times smaller, and the UNet
    halves that between its levels and has to come back to the same size."""
    return config.vae.downscale * 2 ** (len(config.unet.multipliers) - 1)


def default_size(config: Config, image: Image.Image | None = None) -> Size:
    """The model's resolution, as a square or, with its short side, in the shape of a hint's `image`."""
    if image is None:
        return config.resolution, config.resolution
    return fitted_size(image, config.resolution, size_multiple(config))


def make_hint(image: Image.Image, size: Size) -> Tensor:
    """An RGB picture -> a hint (1, 3, H, W) in [0, 1] of exactly `size`."""
    return to_hints([np.array(resized(image, size))])


@torch.no_grad()
def generate(
    sd: StableDiffusion,
    prompt: str,
    controls: Sequence[Control] = (),
    negative: str = "",
    count: int = 1,
    size: Size | None = None,
    steps: int = 20,
    sampler: str = "ddim",
    cfg: float | None = None,
    eta: float = 0.0,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """`count` pictures of `size`; without it, of the hints' size, or square at the model's resolution.

    Picture i has the seed `seed + i` and is the same whatever `count` is. Latents are fp32 also where the networks
    are not. `on_step` is the sampler's (see ldm/samplers.py), called for one picture after the other. `cfg` None is
    `default_cfg`. The ControlNets must be on the device and in the dtype of `sd`; hints are brought there.

    Raises ValueError for a size the model cannot make, hints of other sizes, a seed outside 0..2^63 - 1, or what
    `sample` does not accept (sampler, steps, eta), FloatingPointError for a result that is not finite.
    """
    height, width = picture_size(sd.config, controls, size)
    check_seeds(seed, count)
    cfg = default_cfg(sd.config) if cfg is None else cfg
    denoise = make_denoise(sd, prompt, negative, cfg, controls)
    shape = (1, sd.config.unet.latent_channels, height // sd.config.vae.downscale, width // sd.config.vae.downscale)

    pictures = []
    for i in range(count):
        noise = noise_of(seed + i)
        x = noise(torch.empty(shape, device=next(sd.unet.parameters()).device))  # only its shape and device count
        latents = sample(sampler, denoise, x, sd.schedule, steps, eta, noise, on_step=on_step)
        (image,) = sd.decode(latents)
        check_finite(image)
        pictures.append(to_picture(image))
    return pictures


def picture_size(config: Config, controls: Sequence[Control], size: Size | None) -> Size:
    """The size that is meant. Raises ValueError if the model cannot make it or a hint is of another."""
    if size is None:
        size = tuple(controls[0].hint.shape[-2:]) if controls else default_size(config)
    check_size(config, size)
    for control in controls:
        if control.hint.shape[-2:] != size:
            raise ValueError(
                f"a hint is {described(control.hint.shape[-2:])}, expected the picture's {described(size)}: resize it"
            )
    return size


def check_size(config: Config, size: Size) -> None:
    """Raises ValueError if the model cannot make pictures of this size."""
    multiple = size_multiple(config)
    if any(side < multiple or side % multiple for side in size):
        nearest = tuple(max(1, round(side / multiple)) * multiple for side in size)
        raise ValueError(
            f"the picture's size is {described(size)}, expected multiples of {multiple}: take {described(nearest)}"
        )


def described(size: Size) -> str:
    height, width = size
    return f"{width}x{height} (width x height)"


def check_seeds(seed: int, count: int) -> None:
    """Raises ValueError if a picture's seed is one that a generator does not take."""
    last = 2**63 - max(1, count)
    if not 0 <= seed <= last:
        raise ValueError(f"the seed is {seed}, expected 0 to {last}: take a number between them")


def make_denoise(sd: StableDiffusion, prompt: str, negative: str, cfg: float, controls: Sequence[Control]) -> Denoise:
    """The guided UNet for one picture's fp32 latents: it computes in the base's own dtype."""
    parameter = next(sd.unet.parameters())
    contexts = [sd.encode_text([text]) for text in (prompt, negative)]
    denoise = guided(sd.unet, *contexts, cfg, [replace(c, hint=c.hint.to(parameter)) for c in controls])
    return lambda x, t: denoise(x.to(parameter.dtype), t)


def noise_of(seed: int) -> Callable[[Tensor], Tensor]:
    """noise(x) -> unit noise like x, drawn on the CPU: the same on every device, and one picture's alone."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator).to(x)


def check_finite(image: Tensor) -> None:
    """Raises FloatingPointError where a picture would come out black."""
    if not image.isfinite().all():
        remedy = "take a lower guidance or another checkpoint" if image.dtype == torch.float32 else "take float32"
        computed = str(image.dtype).removeprefix("torch.")
        raise FloatingPointError(f"the picture, computed in {computed}, has values that are not finite: {remedy}")
