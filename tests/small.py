"""A random model small enough to sample from in a test, of the same family as the tiny one."""

import torch
from torch import nn

from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.config import Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig

SMALL = Config(
    "small",
    unet=UNetConfig(
        channels=16,
        multipliers=(1, 1, 2),
        blocks=1,
        attention=(False, True, True),
        heads=(2, 2, 2),
        context_width=16,
        groups=4,
    ),
    vae=VAEConfig(channels=4, multipliers=(1, 1, 2, 2), blocks=1, groups=1),
    text=TextConfig(width=16, heads=2, layers=1, vocabulary=600),
    schedule=ScheduleConfig("v", zero_terminal_snr=True),
    resolution=64,
)


def small_sd() -> StableDiffusion:
    """Always the same weights, strong enough that every input shows in the picture."""
    torch.manual_seed(0)
    return strengthened(StableDiffusion(SMALL)).eval().requires_grad_(False)


def small_control(sd: StableDiffusion) -> ControlNet:
    """As if trained: its zero convolutions are not zero any more."""
    torch.manual_seed(1)
    return strengthened(ControlNet.from_unet(sd.unet)).requires_grad_(False)


def strengthened(module: nn.Module) -> nn.Module:
    """PyTorch's own initialisation shrinks what passes through: the deviation is kept here."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        if isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight)
    return module
