"""Our side of what tools.bench measures, and the models and inputs that both sides get.

Shapes: B batch, H W pixels, h = H/8, w = W/8.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from controlnet import ControlNet
from controlnet.common.devices import PRECISIONS, keep_freed_memory
from controlnet.common.images import to_hints
from controlnet.guidance import Control
from controlnet.inference.generate import generate
from controlnet.objective import ControlLoss
from controlnet.training.data import Batch, Draw, Picture
from controlnet.training.latent_cache import encoded, loss_inputs
from controlnet.training.optimisation import Optimisation, constant_rate
from controlnet.worlds import TINY_CONTROL_OF, WORLDS
from controlnet.worlds.colours import BASIC_COLOURS
from ldm import StableDiffusion
from ldm.config import SD15
from ldm.fast.onednn import quicken
from ldm.fast.packed import pack
from ldm.fast.tiled_vae import decode_in_strips, posterior_in_strips
from ldm.stable_diffusion import WEIGHTS
from ldm.unet import set_checkpointing
from ldm.vae import AutoencoderKL
from tools.bench_processes import Outputs, Setup, Work

PROMPT, NEGATIVE = "red circle with blue background", "green"
SEED = 0
LEARNING_RATE = 1e-5
SAMPLES = 4  # of each world
SMALL_SIDE = 64  # pixels that every base can make: enough to see whether a model is loaded right


# ----------------------------------------------------------------------------------------------------------- the models


def write_tiny(folder: Path) -> None:
    """The small models of `weights/`."""
    sd = StableDiffusion.load("tiny")
    write_models(folder, sd, ControlNet.load(WEIGHTS / "tiny-fill50k.safetensors", sd.unet))


def write_sd15(folder: Path) -> None:
    """SD 1.5 and a ControlNet of its size, 11 GB, filled with numbers. What is complete already is left as it is."""
    if not (folder / "control").exists():
        torch.manual_seed(SEED)
        sd = StableDiffusion(SD15)
        write_models(folder, fill(sd), fill(ControlNet.from_unet(sd.unet)))


def write_models(folder: Path, sd: StableDiffusion, control: ControlNet) -> None:
    """base.safetensors and control.safetensors, and beside them base and control in diffusers' layout."""
    sd.save(folder / "base.safetensors")
    control.save(folder / "control.safetensors")
    sd.save(folder / "base", layout="diffusers")
    control.save(folder / "control", layout="diffusers")  # the last


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Numbers that pass on what comes in, as trained weights do: every input shows in every output, and the control,
    whose zero convolutions are filled too, in the picture."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


# ----------------------------------------------------------------------------------------------------------- the inputs


class Inputs(NamedTuple):
    """Of one training step; the first of the batch is what sampling and the autoencoder get."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    hints: Tensor  # (B, 3, H, W) in [0, 1]
    noise: Tensor  # (B, 4, h, w)
    posterior_noise: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)


def inputs(side: int, batch_size: int) -> Inputs:
    """The same each time, drawn on the CPU, for pictures of `side` pixels."""
    generator = torch.Generator().manual_seed(SEED)
    pictures = torch.rand(2, batch_size, 3, side, side, generator=generator)
    noise = torch.randn(2, batch_size, 4, side // 8, side // 8, generator=generator)
    t = torch.randint(1000, (batch_size,), generator=generator)
    return Inputs(2 * pictures[0] - 1, pictures[1], *noise, t)


def first_noise(side: int) -> Tensor:
    """What `generate` begins with: (1, 4, h, w)."""
    return torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(SEED))


def pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


# ------------------------------------------------------------------------------------------------------------ the tasks


def load_base(setup: Setup) -> StableDiffusion:
    return StableDiffusion.load(setup.folder / "base.safetensors", setup.device, PRECISIONS[setup.precision])


def load(setup: Setup) -> tuple[StableDiffusion, ControlNet]:
    sd = load_base(setup)
    return sd, ControlNet.load(setup.folder / "control.safetensors", sd.unet).requires_grad_(False)


def sampling_in_full(setup: Setup) -> Work:
    return sampling_of_worlds(setup, reuse=1)


def sampling_with_reuse(setup: Setup) -> Work:
    return sampling_of_worlds(setup, reuse=2)


def sampling_of_worlds(setup: Setup, reuse: int) -> Work:
    """Held-out samples of each world with the small models of `weights/`: approximations are judged by pictures that
    mean something."""
    keep_freed_memory(torch.device(setup.device), large=False)
    sd = StableDiffusion.load("tiny", setup.device, PRECISIONS[setup.precision])
    settings = dict(steps=setup.case.steps, cfg=setup.case.cfg, reuse=reuse)
    asked = []  # captions, with their controls
    for world, name in TINY_CONTROL_OF.items():
        net = ControlNet.load(WEIGHTS / f"{name}.safetensors", sd.unet).requires_grad_(False)
        samples = WORLDS[world](sd.config.resolution, colours=BASIC_COLOURS, held_out=True)
        asked += [(samples[i].caption, Control(net, to_hints([samples[i].hint]))) for i in range(SAMPLES)]
    pack(sd.unet, sd.vae, *(control.net for _, control in asked))

    def work() -> Outputs:
        made = [generate(sd, caption, [control], **settings)[0] for caption, control in asked]
        return lambda: {"pictures": torch.stack([pixels(picture) for picture in made])}

    return work


def sampling(setup: Setup) -> Work:
    """A prompt and a hint to a picture, as infer.py does it with the models loaded."""
    keep_freed_memory(torch.device(setup.device), large=False)
    sd, control = load(setup)
    pack(sd.unet, sd.vae, control)
    return lambda: picture(sd, control, setup.case.size, setup.case.steps, setup.case.cfg)


def picture(sd: StableDiffusion, control: ControlNet, side: int, steps: int, cfg: float) -> Outputs:
    hint = inputs(side, 1).hints.to(next(sd.unet.parameters()).device)
    latents = []  # after each step
    (made,) = generate(
        sd,
        PROMPT,
        [Control(control, hint)],
        negative=NEGATIVE,
        steps=steps,
        cfg=cfg,
        seed=SEED,
        on_step=lambda i, x, x0: latents.append(x),
    )
    return lambda: {"latents": latents[-1], "picture": pixels(made)}


def vae_encode(setup: Setup) -> Work:
    return encoding(setup, packed_vae(setup), AutoencoderKL.encode)


def vae_encode_in_strips(setup: Setup) -> Work:
    def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
        return vae.config.scale * posterior_in_strips(vae, images).mean

    return encoding(setup, load_base(setup).vae, encode)


def vae_decode(setup: Setup) -> Work:
    return decoding(setup, packed_vae(setup), AutoencoderKL.decode)


def vae_decode_in_strips(setup: Setup) -> Work:
    return decoding(setup, load_base(setup).vae, decode_in_strips)


def packed_vae(setup: Setup) -> AutoencoderKL:
    keep_freed_memory(torch.device(setup.device), large=False)
    vae = load_base(setup).vae
    pack(vae)
    return vae


def encoding(setup: Setup, vae: AutoencoderKL, encode: Callable[[AutoencoderKL, Tensor], Tensor]) -> Work:
    images = inputs(setup.case.size, 1).images.to(vae.quant_conv.bias)

    @torch.no_grad()
    def work() -> Outputs:
        latents = encode(vae, images)
        return lambda: {"latents": latents}

    return work


def decoding(setup: Setup, vae: AutoencoderKL, decode: Callable[[AutoencoderKL, Tensor], Tensor]) -> Work:
    latents = inputs(setup.case.size, 1).noise.to(vae.post_quant_conv.bias)

    @torch.no_grad()
    def work() -> Outputs:
        images = decode(vae, latents)
        return lambda: {"images": images}

    return work


def training_cached(setup: Setup) -> Work:
    return training(setup, cached=True)


def training_uncached(setup: Setup) -> Work:
    return training(setup, cached=False)


def training(setup: Setup, cached: bool) -> Work:
    """One step of train.py from the batch to the changed weights; cached, pictures and prompts are encoded by then."""
    sd, _ = load(setup)
    control = ControlNet.load(setup.folder / "control.safetensors", sd.unet, dtype=torch.float32)
    for model in (sd, control):
        model.to(memory_format=torch.channels_last)
        set_checkpointing(model, setup.case.checkpointing)
    pack(sd.unet.encoder, sd.vae, sd.text_encoder)
    device = torch.device(setup.device)
    if (device.type, setup.precision) == ("cpu", "fp32"):
        quicken(sd.unet.decoder, control)
    loss = ControlLoss(sd.unet, control, sd.schedule)
    rate = constant_rate(0)
    optimisation = Optimisation(control.named_parameters(), LEARNING_RATE, rate, device, setup.precision, clip=1.0)

    x = inputs(setup.case.size, setup.case.batch_size)
    nothing = torch.zeros(setup.case.batch_size)
    draw = Draw(x.noise, x.t, x.posterior_noise, dropped=nothing.bool())
    content = Picture(x.images, [PROMPT] * setup.case.batch_size)
    with torch.no_grad():
        no_prompt = sd.encode_text([""])
    if cached:
        content = encoded(sd, *content)
        waiting = load_base(setup)
        sd.vae, sd.text_encoder = waiting.vae.cpu(), waiting.text_encoder.cpu()
        del waiting
    keep_freed_memory(device, large=True)
    batch = Batch(content, x.hints, draw, bad=nothing - 1)

    def work() -> Outputs:
        z0, noise, t, context, hint = loss_inputs(sd, batch, no_prompt, device)
        with optimisation.autocast():
            value = loss(z0, noise, t, context, hint)
        optimisation.backward(value)
        norm = optimisation.step()
        return lambda: {"loss": value, "gradient": torch.tensor(norm)}

    return work


def loading(setup: Setup) -> Work:
    """The original layout, until every weight has been read once: until then a file may only be mapped into memory."""

    def work() -> Outputs:
        sd, control = load(setup)
        read_all(sd, control)
        return lambda: picture(sd, control, SMALL_SIDE, 1, setup.case.cfg)()

    return work


@torch.no_grad()
def read_all(*models: nn.Module) -> None:
    for model in models:
        for parameter in model.parameters():
            parameter.sum()
