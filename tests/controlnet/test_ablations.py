"""The baselines that a ControlNet is compared with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import SMALLEST, small_sd
from torch import nn

from controlnet.ablations import start_as
from controlnet.config import ControlConfig
from controlnet.model import ControlNet


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


@pytest.fixture(scope="module")
def inputs(sd):
    generator = torch.Generator().manual_seed(0)
    x, hint = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, 3, 64, 64, generator=generator)
    return x, torch.tensor([9, 700]), sd.encode_text(["a", "b"]), hint


@torch.no_grad()
def test_a_hint_at_the_input_is_what_a_widened_base_reads(sd, inputs):
    """The base's first convolution is widened in earnest, and reads latents and features side by side."""
    x, t, context, hint = inputs
    control = ControlNet.from_unet(sd.unet, ControlConfig(architecture="concat"))
    assert all(not residual.any() for residual in control(*inputs))
    new = control.hint_encoder.convs[-1]
    nn.init.normal_(new.weight, std=0.1)
    nn.init.normal_(new.bias)
    wide, features = copy.deepcopy(sd.unet), hint
    own = wide.encoder.blocks[0].conv
    wide.encoder.blocks[0].conv = both = nn.Conv2d(4 + 256, own.out_channels, 3, padding=1)
    both.weight.copy_(torch.cat([own.weight, new.weight], dim=1))
    both.bias.copy_(own.bias + new.bias)
    for conv in control.hint_encoder.convs[:-1]:
        features = F.silu(conv(features))
    expected = wide(torch.cat([x, features], dim=1), t, context)
    torch.testing.assert_close(sd.unet(x, t, context, control(*inputs)), expected, rtol=1e-4, atol=1e-4)
    assert (expected - sd.unet(x, t, context)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["frozen", "concat"])
def test_a_locked_encoder_lets_gradients_through_and_takes_none(sd, inputs, architecture):
    kind = "concat" if architecture == "concat" else "full"
    control = ControlNet.from_unet(sd.unet, ControlConfig(architecture=kind))
    start_as(control, architecture)
    for conv in (control.hint_encoder.convs[-1], *control.zero_convs, control.middle_zero_conv):
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight)
    sum(residual.square().sum() for residual in control(*inputs)).backward()
    assert all(parameter.grad is None for parameter in control.encoder.parameters())
    assert all(conv.weight.grad.any() for conv in control.hint_encoder.convs)


@pytest.mark.parametrize("architecture", ["lite", "concat"])
def test_a_full_one_is_not_called_a_baseline(architecture):
    unet, config = small_sd().unet, ControlConfig(architecture=architecture)
    assert ControlNet.of(unet, config).architecture == architecture
    with pytest.raises(ValueError, match=f'"{architecture}": take ControlNet.of'):
        ControlNet(unet, config)
