"""A random model small enough to sample from in a test, of the same family as the tiny one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.stored import CheckpointError
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


# For whole training runs, whose time goes into the building of networks: two levels, and half of the layers.
SMALLEST = replace(
    SMALL,
    unet=replace(SMALL.unet, channels=8, multipliers=(1, 2), attention=(False, True), heads=(2, 2)),
    vae=replace(SMALL.vae, multipliers=(1, 1, 1, 1)),
)


def small_sd(config: Config = SMALL) -> StableDiffusion:
    """Always the same weights, strong enough that every input shows in the picture."""
    torch.manual_seed(0)
    return strengthened(StableDiffusion(config)).eval().requires_grad_(False)


def for_inpainting(sd: StableDiffusion) -> StableDiffusion:
    """The same with a UNet that also reads mask and masked image, and does something with them."""
    config = replace(sd.config, unet=replace(sd.config.unet, inpainting=True))
    state, first = sd.state_dict(), "unet.encoder.blocks.0.conv.weight"
    more = torch.randn(len(state[first]), 5, 3, 3, generator=torch.Generator().manual_seed(2))
    state[first] = torch.cat([state[first], 0.1 * more], dim=1)
    wide = StableDiffusion(config)
    wide.load_state_dict(state)
    return wide.eval().requires_grad_(False)


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


def assert_same(model: nn.Module, expected: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Bit by bit, without the parameters whose names begin with any of `but`."""
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], value) for key, value in wanted.items() if not key.startswith(but))


def error_of(function: Callable, *arguments, **keywords) -> str:
    """The message of the CheckpointError that is raised: one sentence, on one line."""
    with pytest.raises(CheckpointError) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message
