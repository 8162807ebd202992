"""Encoding and decoding one image, with networks on the device only while they are used and a tiled VAE if needed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from controlnet.common.devices import temporarily_on
from controlnet.common.images import to_images
from ldm.fast.tiled_vae import decode_tiled, posterior_tiled
from ldm.stable_diffusion import StableDiffusion
from ldm.vae import AutoencoderKL

from .finite import finite


def on_device(device: torch.device | str | None, *networks: nn.Module) -> AbstractContextManager:
    """Inside, the networks are on `device`; afterwards they are back where they were. None leaves them there."""
    return nullcontext() if device is None else temporarily_on(torch.device(device), *networks)


def encode(sd: StableDiffusion, image: Image.Image, generator: torch.Generator, tiled: bool) -> Tensor:
    """`sd.encode` of an RGB image: scaled latents (1, 4, h, w), a sample of the posterior."""
    images, state = to_images([np.array(image)]), generator.get_state()

    def compute() -> Tensor:
        generator.set_state(state)  # the same noise if it is computed again
        if not tiled:
            return sd.encode(images, generator)
        posterior = posterior_tiled(sd.vae, images.to(sd.vae.quant_conv.bias))
        noise = torch.randn(posterior.mean.shape, generator=generator)
        return sd.config.vae.scale * posterior.sample(noise.to(posterior.mean))

    return in_fp32_if_needed(sd.vae, compute)


def decode(sd: StableDiffusion, latents: Tensor, tiled: bool) -> Tensor:
    """`sd.decode` of scaled latents (1, 4, h, w): an image (1, 3, H, W), around [-1, 1] but not clipped to it."""

    def compute() -> Tensor:
        return decode_tiled(sd.vae, latents.to(sd.vae.post_quant_conv.bias)) if tiled else sd.decode(latents)

    return in_fp32_if_needed(sd.vae, compute)


def in_fp32_if_needed(vae: AutoencoderKL, compute: Callable[[], Tensor]) -> Tensor:
    """compute(), once more in fp32 if half precision overflowed: the released autoencoders do at times."""
    result = compute()
    if result.isfinite().all():
        return result
    weight = vae.quant_conv.bias
    dtype, device_type = weight.dtype, weight.device.type
    vae.float()
    try:
        with torch.autocast(device_type, enabled=False):  # else the layers would be computed in half again
            return finite(compute, {"vae": vae})
    finally:
        vae.to(dtype)  # exact: each value came from this type
