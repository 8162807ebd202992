"""The miniatures of the reference numbers in memory, each made once and shared: tests do not change them."""

from functools import cache

import torch
from reference import FIXTURES, MINI_SD1, MINI_SD2, fill
from safetensors.torch import load_file
from torch import Tensor, nn

from controlnet.layouts import control_map
from controlnet.model import ControlNet
from ldm.checkpoints.key_maps import KeyMap, unet_map, vae_map
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

MINIS = {"sd1": MINI_SD1, "sd2": MINI_SD2}


@cache
def stored(name: str) -> dict[str, Tensor]:
    """One file of `fixtures/`: its README says what is in it."""
    return load_file(FIXTURES / f"{name}.safetensors")


def inputs(style: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (2, 4, 16, 24), t (2,), context (2, 77, D) and hint (2, 3, 128, 192) of the stored outputs."""
    g = stored("inputs")
    return g["x"], g["t"], g[f"{style}/context"], g["hint"]


def corner(style: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A part of `inputs`, for what is not compared with stored numbers: x (2, 4, 8, 8) and hint (2, 3, 64, 64)."""
    x, t, context, hint = inputs(style)
    return x[..., :8, :8], t, context, hint[..., :64, :64]


@cache
def mini_unet(style: str) -> UNet:
    unet = UNet(MINIS[style].unet)
    return filled(unet, unet_map(unet.config)).requires_grad_(False)


def new_mini_control(style: str) -> ControlNet:
    """Trainable, for a test that changes it."""
    control = ControlNet.from_unet(mini_unet(style))
    return filled(control, control_map(control.encoder.config, control.config))


@cache
def mini_control(style: str) -> ControlNet:
    return new_mini_control(style).requires_grad_(False)


@cache
def mini_vae() -> AutoencoderKL:
    vae = AutoencoderKL(MINI_SD1.vae)
    return filled(vae, vae_map(vae.config)).requires_grad_(False)


def filled(module: nn.Module, key_map: KeyMap) -> nn.Module:
    sources = key_map.sources(name for name, _ in module.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(fill(sources[name].key, parameter.shape))
    return module


def relative(got: Tensor, want: Tensor) -> float:
    """The relative L2 error."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def every_fourth(features: Tensor) -> Tensor:
    """What is stored of a block's output: the first picture's, every fourth channel; (B, C, h, w) or (B, N, C)."""
    return features[:1, ::4] if features.ndim == 4 else features[:1, :, ::4]
