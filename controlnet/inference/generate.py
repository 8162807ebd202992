"""From a prompt and hints to images, in one call.

    sd = StableDiffusion.load("sd15")
    net = ControlNet.load("canny", sd)
    images = generate(sd, "a bird", [Control.from_image(net, "bird.jpg", detect="canny")], count=4)

Sizes are (height, width) in pixels. Shapes: H W pixels, h = H/8, w = W/8, M prompt tokens, D context width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from controlnet.common.images import Size, check_values
from controlnet.guidance import Control, Predict, check_type, exact, guided
from controlnet.hints.hint_image import HintImage
from ldm.samplers import Denoise, sample_loop, timesteps_for
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet

from .finite import Watched, finite
from .image_to_image import Init, begin, check_inpainting, known_part, steps_done, with_known
from .memory import Plan, default_batch_size
from .noise import draw, noise_from
from .offload import decode, encode, on_device
from .predictors import predictor_for
from .progress import Progress, reporter
from .prompts import encode_prompts
from .sizes import check_batch_size, check_cfg, check_seeds, default_cfg, image_size, latent_shape
from .tiles import Tile, in_tiles, tiles_of


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
    tile_diffusion: bool = False,
    progress: bool = False,
    callback: Callable[[Progress], None] | None = None,
) -> list[Image.Image]:
    """`count` RGB images of `size`: by default the size of hints that are tensors, else one fitted to `init` or to the
    first hint's image, else a square. (With `init.only_masked` it is the size at which a part is made.)

    Image i has the seed `seed + i`, and its own hint or mask where these are a batch of `count`. `batch_size` images
    are made at once, by default `default_batch_size`; it changes an image by rounding alone. `cfg` None is
    `default_cfg`.
    The ControlNets must be on the device and in the dtype of `sd`; hints and masks are brought there, and latents are
    fp32. An inpainting base needs an `init` with a mask. prompts.py says how prompts are read. `progress` shows a bar,
    and `callback` is called after each step of each image.

    `reuse` N computes the ControlNets and all but two blocks of the UNet at every Nth step only (reuse.py): faster, and
    another image, though at 2 a similar one.

    These give the same image to rounding. `compile` has PyTorch compile the UNet and the ControlNets, which takes a
    minute or more for the first image of a size; it goes with neither `reuse` nor `cpu_offload` nor packed weights.
    `cpu_offload` names the device to compute on while `sd` and the ControlNets wait on the CPU: each network is there
    only while it is used, the branches of the guidance are evaluated one after the other, and the VAE is tiled.

    `tile_diffusion` denoises images larger than the base's resolution in tiles (tiles.py), in less memory.

    Raises TypeError for an argument of another type, ValueError for a value that is out of its range, for a size that
    the model cannot make or that a hint does not have, and as `sample` and `encode_prompts` do, FloatingPointError with
    the layer's name for a result that is not finite.
    """
    check_controls(controls, sd, count)
    check_type("init", init, Init | None, "an Init: make it with Init(image)")
    check_inpainting(sd.config, init)
    size = image_size(sd.config, controls, size, init)
    check_seeds(seed, count)
    check_batch_size(batch_size)
    cfg = default_cfg(sd.config) if cfg is None else cfg
    check_cfg(cfg)
    low_memory = cpu_offload is not None
    tiles = tiles_of(sd.config, size) if tile_diffusion else []
    make_predictor = predictor_for(sd, reuse, compile, low_memory, in_parts=bool(tiles))
    timesteps = timesteps_for(sampler, sd.schedule, steps)
    if init:
        timesteps = timesteps[len(timesteps) - steps_done(init.strength, len(timesteps)) :]
    if count < 1:
        return []
    if init and not timesteps:  # nothing is changed, not even by the autoencoder
        return [init.resized(size).image if init.only_masked is None else init.image] * count
    controls = [at_size(control, size, init) for control in controls]
    if batch_size is None:
        plan = Plan(sd.config, size, sd.dtype, len(controls), low_memory, tile_diffusion)
        batch_size = default_batch_size(plan, count, sd.device if cpu_offload is None else torch.device(cpu_offload))

    # Each image draws from its own generator, in a fixed order: x, the posteriors' noise, then the sampler's.
    generators = [torch.Generator().manual_seed(int(seed) + i) for i in range(count)]
    noises, seen = draw(generators, latent_shape(sd.config, size)), None
    if init:
        start = init.resized(size)
        with on_device(cpu_offload, sd.vae):
            z0 = encode(sd, start.pixels(), generators, low_memory)
            seen = known_part(sd, start, generators, low_memory) if sd.config.unet.inpainting else None
    with on_device(cpu_offload, sd.text_encoder):
        contexts = prompt_contexts(sd, prompt, negative, clip_skip, long_prompts)

    def preview(denoise: Watched, x0: Tensor) -> Image.Image:
        denoise.check(x0)
        with on_device(cpu_offload, sd.vae):
            return decode(sd, x0, low_memory)[0]

    latents, bar = [], tqdm(total=count * len(timesteps), unit="step", disable=not progress)
    with bar, on_device(cpu_offload, sd.unet, *(control.net for control in controls)):
        for first in range(0, count, batch_size):
            batch = slice(first, first + batch_size)
            x, noise, keep = noises[batch].to(sd.device), noise_from(generators[batch]), None
            prompts = [context.expand(len(x), -1, -1) for context in contexts]
            part = None if seen is None else seen[batch].to(x)
            acting = [control.of_images(batch) for control in controls]
            denoise = make_denoise(sd, *prompts, cfg, acting, timesteps, not low_memory, make_predictor, part, tiles)
            if init:
                x, keep = begin(start, z0[batch].to(x), x, noise, sd.schedule, timesteps, blend=seen is None)
            on_step = reporter(bar, callback, first, len(timesteps), partial(preview, denoise))
            latents.append(sample_loop(sampler, denoise, x, timesteps, sd.schedule, eta, noise, keep, on_step))
            denoise.check(latents[-1])

    with on_device(cpu_offload, sd.vae):
        images = [image for x in latents for image in decode(sd, x, low_memory)]
    return [init.put_back(image, start) for image in images] if init else images


# ---------------------------------------------------------------------------------------------------- controls


def check_controls(controls: Sequence[Control], sd: StableDiffusion, count: int) -> None:
    """Raises TypeError for anything but a sequence of controls, ValueError for a hint or mask that is out of range or a
    batch of neither 1 nor `count`, and for a ControlNet that is not in the dtype and on the device of `sd`."""
    for control in controls if isinstance(controls, Sequence) else [controls]:
        if control is controls or not isinstance(control, Control):
            raise TypeError(
                f"found a {type(control).__name__} in controls, expected a list of Control: make each with "
                "Control.from_image(net, image)"
            )
        for what, given in (("a hint", control.hint), ("a control's mask", control.mask)):
            if isinstance(given, Tensor):
                check_values(what, given)
                if len(given) not in (1, count):
                    raise ValueError(f"{what} is a batch of {len(given)}, expected 1 or {count}, one for each image")
        like = next(control.net.parameters())
        found, expected = (f"{net.dtype} on {net.device}" for net in (like, sd))
        if found != expected and not torch.is_autocast_enabled(sd.device.type):
            raise ValueError(f"a ControlNet is {found}, expected the base's {expected}: load it with that base")


def at_size(control: Control, size: Size, init: Init | None) -> Control:
    """The control with its hint as a tensor of `size`, cut to the part of `init` that is made."""
    if isinstance(control.hint, Tensor):
        return control
    return replace(control, hint=hint_part(control.hint, size, init).at(size, control.net.config.hint_channels))


def hint_part(hint: HintImage, size: Size, init: Init | None) -> HintImage:
    """The hint cut to the part of `init` that is made: both show the same view."""
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
    timesteps: Sequence[float],
    batched: bool,
    make_predictor: Callable[[UNet], Predict],
    seen: Tensor | None = None,
    tiles: Sequence[Tile] = (),
) -> Watched:
    """The guided UNet for fp32 latents, which computes in the base's dtype. `seen` comes from `known_part`."""
    like = next(sd.unet.parameters())
    prompt, negative = prompt.to(like), negative.to(like)
    controls = [replace(c, hint=c.hint.to(like), mask=None if c.mask is None else c.mask.to(like)) for c in controls]

    def of_part(make: Callable[[UNet], Predict], controls: Sequence[Control], seen: Tensor | None) -> Denoise:
        denoise = guided(sd.unet, prompt, negative, cfg, controls, timesteps, batched, make)
        return lambda x, t, timestep: denoise(with_known(x.to(like.dtype), seen), t, timestep)

    def with_predictor(make: Callable[[UNet], Predict]) -> Denoise:
        if not tiles:
            return of_part(make, controls, seen)
        denoisers = []
        for tile in tiles:
            acting = [tile.of_control(control, sd.config.vae.downscale) for control in controls]
            denoisers.append(of_part(make, acting, None if seen is None else tile.of(seen)))
        return in_tiles(tiles, denoisers, like.device)

    networks = {"unet": sd.unet, **{f"control {i + 1}": control.net for i, control in enumerate(controls)}}
    return Watched(with_predictor(make_predictor), partial(with_predictor, exact), networks)
