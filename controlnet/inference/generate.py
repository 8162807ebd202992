"""From a prompt and hints to images, in one call.

    sd = StableDiffusion.load("sd15")
    net = ControlNet.load("canny", sd)
    images = generate(sd, "a bird", [Control.from_image(net, "bird.jpg", detect="canny")], count=4)

Sizes are (height, width) in pixels. Shapes: H W pixels, h = H/8, w = W/8, M prompt tokens, D context width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from controlnet.common.images import Size, fitted_size, size_text
from controlnet.guidance import Control, Predict, exact, guided
from controlnet.hints.hint_image import HintImage
from controlnet.reuse import reusing
from ldm.config import Config
from ldm.samplers import Denoise, sample, timesteps_for
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet

from .compiled import check_compile, compiling
from .finite import Watched, finite
from .graphed import graphed
from .image_to_image import Init, begin, steps_done
from .memory import fitting_batch
from .noise import draw, noise_from
from .offload import decode, encode, on_device
from .progress import Progress, reporter
from .prompts import encode_prompts

LARGEST_SIDE = 8192  # pixels: guards against typos that exhaust time and memory
LARGEST_BATCH = 16  # by default: a larger one fills no GPU better, and its first image comes later


@torch.no_grad()
def generate(
    sd: StableDiffusion,
    prompt: str,
    controls: Sequence[Control] = (),
    *,
    negative: str = "",
    count: int = 1,
    batch_size: int | None = None,
    size: Size | None = None,
    steps: int = 20,
    sampler: str = "ddim",
    cfg: float | None = None,
    eta: float = 0.0,
    seed: int = 0,
    init: Init | None = None,
    clip_skip: int = 1,
    long_prompts: bool = False,
    reuse: int = 1,
    compile: bool = False,
    cpu_offload: torch.device | str | None = None,
    progress: bool = False,
    callback: Callable[[Progress], None] | None = None,
) -> list[Image.Image]:
    """`count` RGB images of `size`. By default that is the size of hints that are tensors, or it is fitted to `init` or
    to the first hint's image, or it is a square. (With `init.only_masked` it is the size at which a part is made.)

    Image i has the seed `seed + i`, whatever `count` is. `batch_size` of them are made at once, by default
    `default_batch_size`; how many others are in its batch changes an image by rounding alone. Latents are fp32 even
    where the networks are not. `cfg` None is `default_cfg`. prompts.py says how prompts are read. The ControlNets must
    be on the device and in the dtype of `sd`; hints and masks are brought there. `progress` shows a bar, `callback` is
    called after each step of each image.

    `reuse` N computes the ControlNets and all but two blocks of the UNet at every Nth step only (reuse.py): faster, and
    another image, though at 2 a similar one.

    `compile` has the UNet and the ControlNets compiled by PyTorch, a minute or more for the first image of a size.
    The image is the same to rounding. It goes with neither `reuse` nor `cpu_offload`, and not with packed weights.

    `cpu_offload` names the device to compute on while `sd` and the ControlNets wait on the CPU: each is there only
    while it is used, the branches of the guidance are evaluated one after the other, and the VAE is tiled. The image is
    the same to rounding.

    Raises TypeError for controls that are none, ValueError for a size that the model cannot make, hints of other sizes,
    a negative `cfg`, a seed outside 0..2^63 - 1, a `batch_size` or `reuse` below 1, what cannot be compiled, or what
    `sample` or `encode_prompts` do not accept (sampler, steps, eta, clip_skip, weights of words), FloatingPointError
    with the layer's name for a result that is not finite.
    """
    check_controls(controls)
    size = image_size(sd.config, controls, size, init)
    check_seeds(seed, count)
    check_batch_size(batch_size)
    cfg = default_cfg(sd.config) if cfg is None else cfg
    check_cfg(cfg)
    if compile:
        check_compile(reuse, cpu_offload is not None, sd.unet)
    make_predictor = compiling() if compile else reusing(reuse) if reuse != 1 else fastest_exact(sd.device)
    timesteps = timesteps_for(sampler, sd.schedule, steps)
    skip = len(timesteps) - steps_done(init.strength, len(timesteps)) if init else 0
    timesteps = timesteps[skip:]
    if count < 1:
        return []
    if init and not timesteps:  # nothing is changed, not even by the autoencoder
        return [init.resized(size).image if init.only_masked is None else init.image] * count
    controls = [at_size(control, size, init) for control in controls]
    tiled = cpu_offload is not None
    if batch_size is None:
        batch_size = default_batch_size(sd, size, count, controls, cpu_offload)

    # Each image draws from its own generator, in a fixed order: x, the posterior's noise, then the sampler's.
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    noises = draw(generators, latent_shape(sd.config, size))
    if init:
        start = init.resized(size)
        with on_device(cpu_offload, sd.vae):
            known = encode(sd, start.image, generators, tiled)
    with on_device(cpu_offload, sd.text_encoder):
        contexts = prompt_contexts(sd, prompt, negative, clip_skip, long_prompts)

    def preview(denoise: Watched, x0: Tensor) -> Image.Image:
        denoise.check(x0)
        with on_device(cpu_offload, sd.vae):
            return decode(sd, x0, tiled)[0]

    latents, bar = [], tqdm(total=count * len(timesteps), unit="step", disable=not progress)
    with bar, on_device(cpu_offload, sd.unet, *(control.net for control in controls)):
        for first in range(0, count, batch_size):
            batch = slice(first, first + batch_size)
            x, noise, keep = noises[batch].to(sd.device), noise_from(generators[batch]), None
            prompts = [context.expand(len(x), -1, -1) for context in contexts]
            denoise = make_denoise(sd, *prompts, cfg, controls, timesteps, cpu_offload is None, make_predictor)
            if init:
                x, keep = begin(start, known[batch].to(x), x, noise, sd.schedule, timesteps)
            on_step = reporter(bar, callback, first, len(timesteps), partial(preview, denoise))
            latents.append(sample(sampler, denoise, x, sd.schedule, steps, eta, noise, keep, on_step, skip))
            denoise.check(latents[-1])

    with on_device(cpu_offload, sd.vae):
        images = [image for x in latents for image in decode(sd, x, tiled)]
    return [init.put_back(image, start) for image in images] if init else images


# ---------------------------------------------------------------------------------------------------- sizes and seeds


def default_cfg(config: Config) -> float:
    """The released Stable Diffusion's default, and less for the small base."""
    return 2.5 if config.name == "tiny" else 7.5


def size_multiple(config: Config) -> int:
    """What both sides of an image must be a multiple of: 64 for SD. The VAE divides them by 8, and the UNet halves them
    between its levels and has to come back to the same size."""
    return config.vae.downscale * 2 ** (len(config.unet.multipliers) - 1)


def default_size(config: Config, image: Image.Image | None = None) -> Size:
    """The model's resolution, as a square or, as its short side, in the aspect ratio of `image`."""
    if image is None:
        return config.resolution, config.resolution
    return fitted_size(image, config.resolution, size_multiple(config))


def image_size(config: Config, controls: Sequence[Control], size: Size | None, init: Init | None = None) -> Size:
    """The size that is meant. Raises ValueError if the model cannot make it or a hint that is a tensor has another."""
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
    """Raises ValueError for what is no strength of the guidance."""
    if not 0 <= cfg < math.inf:
        raise ValueError(
            f"the guidance (cfg) is {cfg}, expected 0 (the negative prompt alone), 1 (the prompt alone) or more: "
            "exchange the two prompts to move away from the prompt"
        )


def check_seeds(seed: int, count: int) -> None:
    """Raises ValueError if an image's seed is one that a generator does not take."""
    last = 2**63 - max(1, count)
    if last < 0:
        raise ValueError(f"the number of images is {count}, more than there are seeds: take fewer")
    if not 0 <= seed <= last:
        raise ValueError(f"the seed is {seed}, expected 0 to {last}: take a number between them")


def default_batch_size(
    sd: StableDiffusion, size: Size, count: int, controls: Sequence[Control], cpu_offload: torch.device | str | None
) -> int:
    """How many images of `generate` are made at once: on CUDA as many as fit in memory, up to 16, and on a CPU one.

    At batch 1 a GPU waits for its next kernel most of the time. A CPU has enough to do.
    """
    device = sd.device if cpu_offload is None else torch.device(cpu_offload)
    count = min(count, LARGEST_BATCH)
    return fitting_batch(sd.config, size, sd.dtype, device, count, cpu_offload is not None, len(controls))


def fastest_exact(device: torch.device) -> Callable[[UNet], Predict]:
    return graphed if device.type == "cuda" else exact


def check_batch_size(batch_size: int | None) -> None:
    """Raises ValueError for a number of images that cannot be made at once."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}, expected 1 (one image after the other) or more")


# ---------------------------------------------------------------------------------------------------- controls


def check_controls(controls: Sequence[Control]) -> None:
    """Raises TypeError for anything but a sequence of controls."""
    for control in controls if isinstance(controls, Sequence) else [controls]:
        if control is controls or not isinstance(control, Control):
            raise TypeError(
                f"found a {type(control).__name__} in controls, expected a list of Control: make each with "
                "Control.from_image(net, image)"
            )


def at_size(control: Control, size: Size, init: Init | None = None) -> Control:
    """With a hint that is a tensor, of the part that is made of `init`."""
    if isinstance(control.hint, Tensor):
        return control
    return replace(control, hint=hint_part(control.hint, size, init).at(size, control.net.config.hint_channels))


def hint_part(hint: HintImage, size: Size, init: Init | None) -> HintImage:
    """Of an image of the same view as `init`, what is made of it."""
    if init is None or init.only_masked is None:
        return hint
    image, *layers = (init.part(layer, size) for layer in (hint.image, *hint.layers))
    return replace(hint, image=image, mask=hint.mask and init.part(hint.mask, size), layers=tuple(layers))


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
    make_predictor: Callable[[UNet], Predict],
) -> Watched:
    """The guided UNet for fp32 latents: it computes in the base's own dtype."""
    like = next(sd.unet.parameters())
    prompt, negative = prompt.to(like), negative.to(like)
    controls = [replace(c, hint=c.hint.to(like), mask=None if c.mask is None else c.mask.to(like)) for c in controls]

    def with_predictor(make_predictor: Callable[[UNet], Predict]) -> Denoise:
        denoise = guided(sd.unet, prompt, negative, cfg, controls, timesteps, batched, make_predictor)
        return lambda x, t, timestep: denoise(x.to(like.dtype), t, timestep)

    networks = {"unet": sd.unet, **{f"control {i + 1}": control.net for i, control in enumerate(controls)}}
    return Watched(with_predictor(make_predictor), partial(with_predictor, exact), networks)
