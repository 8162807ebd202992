"""Encoding and decoding images, with a tiled VAE if wanted, and CPU offload: networks on the device only while used."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from controlnet.common.devices import temporarily_on
from controlnet.common.images import to_pil
from ldm.fast.tiled_vae import decode_tiled, posterior_tiled
from ldm.stable_diffusion import StableDiffusion
from ldm.vae import AutoencoderKL

from .finite import finite
from .memory import decoding_memory, fitting
from .noise import draw


def on_device(device: torch.device | str | None, *networks: nn.Module) -> AbstractContextManager:
    """Inside, the networks are on `device`; afterwards they are back where they were. None leaves them there."""
    return nullcontext() if device is None else temporarily_on(torch.device(device), *networks)


def encode(sd: StableDiffusion, image: Tensor, generators: list[torch.Generator], tiled: bool) -> Tensor:
    """(1, 3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w), as by `sd.encode`: for each generator a sample of the
    posterior."""
    height, width = (side // sd.config.vae.downscale for side in image.shape[-2:])
    noise = draw(generators, (sd.config.vae.latent_channels, height, width))

    def compute() -> Tensor:
        like = sd.vae.quant_conv.bias
        posterior = posterior_tiled(sd.vae, image.to(like)) if tiled else sd.vae.posterior(image.to(like))
        return sd.config.vae.scale * posterior.sample(noise.to(posterior.mean))

    latents = compute()
    return latents if latents.isfinite().all() else in_fp32(sd.vae, compute)


def decode(sd: StableDiffusion, latents: Tensor, tiled: bool) -> list[Image.Image]:
    """Scaled latents (B, 4, h, w) -> RGB images, decoded at once as far as they fit into memory."""

    def compute(latents: Tensor) -> Tensor:
        return decode_tiled(sd.vae, latents.to(sd.vae.post_quant_conv.bias)) if tiled else sd.decode(latents)

    size = tuple(side * sd.config.vae.downscale for side in latents.shape[-2:])
    each = decoding_memory(sd.config, size, next(sd.vae.parameters()).dtype, tiled)
    at_once = fitting(len(latents), latents.device, each)
    decoded = [image for part in latents.split(at_once) for image in compute(part)]
    for i, image in enumerate(decoded):
        if not image.isfinite().all():
            (decoded[i],) = in_fp32(sd.vae, partial(compute, latents[i : i + 1]))
    return [to_pil(image) for image in decoded]


def in_fp32(vae: AutoencoderKL, compute: Callable[[], Tensor]) -> Tensor:
    """The result of `compute`, which overflowed in half precision, in fp32: the released autoencoders need it at times.
    Raises FloatingPointError if that is not finite either."""
    weight = vae.quant_conv.bias
    dtype, device_type = weight.dtype, weight.device.type
    vae.float()
    try:
        with torch.autocast(device_type, enabled=False):  # else the layers would be computed in half again
            return finite(compute, {"vae": vae})
    finally:
        vae.to(dtype)  # exact: each value came from this type
