"""What it takes to make large pictures on small devices: networks on the device only while they are used, the
autoencoder in strips, and in fp32 where halves overflow."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from controlnet.common.devices import borrowed
from controlnet.common.images import to_images
from ldm.fast.tiled_vae import decode_in_strips, posterior_in_strips
from ldm.vae import AutoencoderKL, Posterior

from .finite import finite


def on_device(device: torch.device | str | None, *networks: nn.Module) -> AbstractContextManager:
    """The networks are on `device` inside and back where they were afterwards; None leaves them there."""
    return nullcontext() if device is None else borrowed(torch.device(device), *networks)


def posterior_of(vae: AutoencoderKL, image: Image.Image, in_strips: bool) -> Posterior:
    """An RGB picture -> the distribution of its latents (1, 4, h, w), in fp32."""
    images = to_images([np.array(image)])

    def encode(vae: AutoencoderKL) -> Tensor:
        like = vae.quant_conv.bias
        posterior = posterior_in_strips(vae, images.to(like)) if in_strips else vae.posterior(images.to(like))
        return torch.stack([posterior.mean, posterior.logvar]).float()

    return Posterior(*in_fp32_if_needed(vae, encode))


def decode(vae: AutoencoderKL, latents: Tensor, in_strips: bool) -> Tensor:
    """Scaled latents (1, 4, h, w) -> images (1, 3, H, W), around [-1, 1] but not clipped to it."""

    def decode(vae: AutoencoderKL) -> Tensor:
        x = latents.to(vae.post_quant_conv.bias)
        return decode_in_strips(vae, x) if in_strips else vae.decode(x)

    return in_fp32_if_needed(vae, decode)


def in_fp32_if_needed(vae: AutoencoderKL, compute: Callable[[AutoencoderKL], Tensor]) -> Tensor:
    """compute(vae), and again with a copy in fp32 where halves overflowed: the released autoencoders do at times."""
    result = compute(vae)
    if result.isfinite().all():
        return result
    if vae.quant_conv.bias.dtype != torch.float32:
        vae = copy.deepcopy(vae).float()
    return finite(lambda: compute(vae), {"vae": vae})
