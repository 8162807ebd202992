"""From a prompt and hints to pictures, in one call.

    sd = StableDiffusion.load("sd15")
    net = ControlNet.load("weights/control_sd15_canny.safetensors", sd.unet)
    image = read_image("edges.png")
    hint = make_hint(image, default_size(sd.config, image))
    pictures = generate(sd, "a bird", [Control(net, hint)], count=4)

Sizes are (height, width) in pixels. Shapes: H W pixels, h = H/8, w = W/8.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlnet.common.images import Size, described, fitted_size, resized, to_hints, to_picture
from controlnet.guidance import Control, guided
from ldm.config import Config
from ldm.samplers import Denoise, Noise, OnStep, sample, timesteps_for
from ldm.stable_diffusion import StableDiffusion

from .finite import finite
from .image_to_image import Init, Start
from .offload import decode, on_device, posterior_of
from .prompts import encode_prompts

# The guidance when none is asked for: the released Stable Diffusion's default, and less for the small base.
DEFAULT_CFG = 7.5
DEFAULT_CFG_OF = {"tiny": 2.5}

LARGEST_SIDE = 16384  # pixels: a slip of the hand is not to fill the memory


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
    init: Init | None = None,
    clip_skip: int = 1,
    long_prompts: bool = False,
    low_memory: torch.device | str | None = None,
    reuse: int = 1,
) -> list[Image.Image]:
    """`count` pictures of `size`; without it, of the hints' size, or fitted to `init`, or square.

    Picture i has the seed `seed + i` and is the same whatever `count` is. Latents are fp32 also where the networks
    are not. `on_step` is the sampler's (see ldm/samplers.py), called for one picture after the other. `cfg` None is
    `default_cfg`. Prompts are read as prompts.py says. The ControlNets must be on the device and in the dtype of `sd`;
    hints and masks are brought there.

    `low_memory` names the device to compute on while `sd` and the ControlNets wait on the CPU: each is there only
    while it is used, the branches of the guidance are evaluated one after the other, and pictures are encoded and
    decoded in strips. The picture is the same to rounding.

    `reuse` N computes the ControlNets and all but two blocks of the UNet at every Nth step only (see reuse.py): faster,
    and another picture, though at 2 a similar one.

    Raises ValueError for a size the model cannot make, hints of other sizes, a negative `cfg`, a seed outside
    0..2^63 - 1, a `reuse` below 1, or what `sample` or `encode_prompts` do not accept (sampler, steps, eta, clip_skip,
    weights of words), FloatingPointError with the layer's name for a result that is not finite.
    """
    height, width = size = picture_size(sd.config, controls, size, init)
    check_seeds(seed, count)
    cfg = default_cfg(sd.config) if cfg is None else cfg
    check_cfg(cfg)
    timesteps = timesteps_for(sampler, sd.schedule, steps)
    start = None
    if init is not None:
        init = init.resized(size)
        with on_device(low_memory, sd.vae):
            posterior = posterior_of(sd.vae, init.image, low_memory is not None)
        start = Start(init, posterior, sd.config.vae.scale, sd.schedule, timesteps)
    skip = start.skip if start else 0
    with on_device(low_memory, sd.text_encoder):
        contexts = prompt_contexts(sd, prompt, negative, clip_skip, long_prompts)

    shape = (1, sd.config.unet.latent_channels, height // sd.config.vae.downscale, width // sd.config.vae.downscale)
    with on_device(low_memory, sd.unet, *(control.net for control in controls)):
        denoise = make_denoise(sd, *contexts, cfg, controls, timesteps[skip:], low_memory is None, reuse)
        latents = []
        for i in range(count):
            noise = noise_of(seed + i)
            x = noise(torch.empty(shape, device=next(sd.unet.parameters()).device))  # only shape and device count
            keep = None
            if start:
                x, keep = start.begin(x, noise)
            latents.append(sample(sampler, denoise, x, sd.schedule, steps, eta, noise, keep, on_step, skip))

    with on_device(low_memory, sd.vae):
        pictures = [to_picture(decode(sd.vae, x, low_memory is not None)[0]) for x in latents]
    if init is None or init.mask is None:
        return pictures
    return [Image.composite(picture, init.image, init.mask) for picture in pictures]


# ---------------------------------------------------------------------------------------------------- sizes and seeds


def picture_size(config: Config, controls: Sequence[Control], size: Size | None, init: Init | None = None) -> Size:
    """The size that is meant. Raises ValueError if the model cannot make it or a hint is of another."""
    if size is None:
        own = default_size(config, init.image if init else None)
        size = tuple(controls[0].hint.shape[-2:]) if controls else own
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
    if any(not multiple <= side <= LARGEST_SIDE for side in size) or any(side % multiple for side in size):
        nearest = tuple(min(max(1, round(side / multiple)) * multiple, LARGEST_SIDE) for side in size)
        raise ValueError(
            f"the picture's size is {described(size)}, expected multiples of {multiple} up to {LARGEST_SIDE}: take "
            f"{described(nearest)}"
        )


def check_cfg(cfg: float) -> None:
    """Raises ValueError for what is no strength of the guidance."""
    if not 0 <= cfg < math.inf:
        raise ValueError(
            f"the guidance (cfg) is {cfg}, expected 0 (the negative prompt alone), 1 (the prompt alone) or more: "
            "exchange the two prompts to move away from the prompt"
        )


def check_seeds(seed: int, count: int) -> None:
    """Raises ValueError if a picture's seed is one that a generator does not take."""
    last = 2**63 - max(1, count)
    if last < 0:
        raise ValueError(f"the number of pictures is {count}, more than there are seeds: take fewer")
    if not 0 <= seed <= last:
        raise ValueError(f"the seed is {seed}, expected 0 to {last}: take a number between them")


def noise_of(seed: int) -> Noise:
    """noise(x) -> unit noise like x, drawn on the CPU: the same on every device, and one picture's alone."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator).to(x)


# ---------------------------------------------------------------------------------------------------- the networks


def prompt_contexts(sd: StableDiffusion, prompt: str, negative: str, clip_skip: int, long: bool) -> tuple[Tensor, ...]:
    """The two contexts (1, M, D), of equal length."""
    networks = {"text_encoder": sd.text_encoder}
    return finite(lambda: encode_prompts(sd, [prompt, negative], clip_skip, long), networks).split(1)


def make_denoise(
    sd: StableDiffusion,
    prompt: Tensor,
    negative: Tensor,
    cfg: float,
    controls: Sequence[Control],
    timesteps: Sequence[int],
    batched: bool,
    reuse: int,
) -> Denoise:
    """The guided UNet for one picture's fp32 latents: it computes in the base's own dtype."""
    like = next(sd.unet.parameters())
    prompt, negative = prompt.to(like), negative.to(like)
    controls = [replace(c, hint=c.hint.to(like), mask=None if c.mask is None else c.mask.to(like)) for c in controls]
    denoise = guided(sd.unet, prompt, negative, cfg, controls, timesteps, batched, reuse)
    networks = {"unet": sd.unet, **{f"control {i + 1}": control.net for i, control in enumerate(controls)}}
    return lambda x, t: finite(lambda: denoise(x.to(like.dtype), t), networks)
