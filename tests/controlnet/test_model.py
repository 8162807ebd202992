"""The ControlNet and its guidance against the published code's numbers, and what they leave alone."""

import copy
from dataclasses import replace

import pytest
import torch
from minis import MINIS, corner, every_fourth, inputs, mini_control, mini_unet, relative, stored
from small import SMALLEST
from torch import nn

from controlnet.guidance import Control, guided
from controlnet.model import ControlNet
from ldm.samplers import ddim_timesteps, sample_loop, timesteps_for
from ldm.schedule import Schedule
from ldm.unet import UNet

TOLERANCE = 2e-5


# ----------------------------------------------------------------------------------------------------------- numbers


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_hint_features_are_the_published_ones(style):
    g, hint_encoder, hint = stored("control"), mini_control(style).hint_encoder, stored("inputs")["hint"]
    assert relative(every_fourth(hint_encoder(hint)), g[f"{style}/hint_features"]) < TOLERANCE
    assert relative(every_fourth(hint_encoder(100 * hint)), g[f"{style}/hint_features_strong_hint"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_residuals_are_the_published_ones_in_the_encoders_order_and_the_middles_last(style):
    g, (x, t, context, hint) = stored("control"), inputs(style)
    residuals = mini_control(style)(x, t, context, hint)
    assert len(residuals) == 13
    for i, residual in enumerate(residuals):
        assert relative(every_fourth(residual), g[f"{style}/control/{i:02d}"]) < TOLERANCE, i


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_every_block_of_the_copy_gives_the_published_features(style):
    g, control, found = stored("control"), mini_control(style), []
    blocks = [*control.encoder.blocks, control.encoder.middle]
    hooks = [block.register_forward_hook(lambda *call: found.append(call[-1])) for block in blocks]
    control(*inputs(style))
    for hook in hooks:
        hook.remove()
    *skips, middle = found  # the first one before the hint is added
    for i, features in enumerate(skips):
        assert relative(every_fourth(features), g[f"{style}/input_blocks.{i:02d}"]) < TOLERANCE, i
    assert relative(every_fourth(middle), g[f"{style}/middle_block"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_a_transformer_of_the_copy_alone_is_the_published_one(style):
    """On an input of size 0.01, where the epsilon of its norm counts."""
    g, context = stored("probes"), stored("inputs")[f"{style}/context"][:1]
    output = mini_control(style).encoder.blocks[4].transformer(g["control_model.input_blocks.4.1/in"], context)
    assert relative(output, g[f"{style}/control_model.input_blocks.4.1/out"]) < 1e-5


HINTS = {
    "eps_control": lambda hint: hint,
    "eps_hint_zeros": torch.zeros_like,
    "eps_strong_hint": lambda hint: 100 * hint,
}


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
@pytest.mark.parametrize("name", HINTS)
def test_the_controlled_output_is_the_published_one(style, name):
    x, t, context, hint = inputs(style)
    residuals = mini_control(style)(x, t, context, HINTS[name](hint))
    output = mini_unet(style)(x, t, context, residuals)
    assert relative(output, stored("control")[f"{style}/{name}"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_averaged_residuals_give_the_published_output(style):
    (x, t, context, hint), control = inputs(style), copy.copy(mini_control(style))
    control.config = replace(control.config, global_average_pooling=True)
    output = mini_unet(style)(x, t, context, control(x, t, context, hint))
    assert relative(output, stored("control")[f"{style}/eps_global_average_pooling"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_two_controls_add_up_to_the_published_output(style):
    net, (x, t, context, hint) = mini_control(style), inputs(style)
    controls = [Control(net, hint, scale=0.7), Control(net, hint.flip(-1), scale=0.6)]
    output = guided(mini_unet(style), context, context, cfg=1, controls=controls)(x, t)
    assert relative(output, stored("control")[f"{style}/eps_two_controls_hint_and_hflip_0.7_0.6"]) < TOLERANCE


# ---------------------------------------------------------------------------------------------------- a fresh control


def random_unet(config):
    torch.manual_seed(0)
    return UNet(config).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2", "small"])
def test_a_fresh_control_leaves_every_bit_of_the_output(name):
    unet = random_unet(SMALLEST.unet) if name == "small" else mini_unet(name)
    x, t, _, hint = corner("sd1")
    context = torch.randn(2, 7, unet.config.context_width, generator=torch.Generator().manual_seed(1))
    residuals = ControlNet.from_unet(unet)(x, t, context, hint)
    assert len(residuals) == len(unet.encoder.blocks) + 1
    assert all(torch.count_nonzero(residual) == 0 for residual in residuals)
    assert torch.equal(unet(x, t, context, residuals), unet(x, t, context))


def test_a_fresh_control_is_a_trainable_copy_in_fp32():
    unet = random_unet(SMALLEST.unet).half()
    control = ControlNet.from_unet(unet)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in control.parameters())
    copied, original = control.encoder.state_dict(), unet.encoder.state_dict()
    assert copied.keys() == original.keys()
    assert all(torch.equal(copied[key], value.float()) for key, value in original.items())


def test_training_the_copy_leaves_the_original_alone():
    unet = random_unet(SMALLEST.unet)
    before = copy.deepcopy(unet.state_dict())
    with torch.no_grad():
        for parameter in ControlNet.from_unet(unet).parameters():
            parameter += 1
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- guidance


class Counted(nn.Module):
    """Another module, with a list of the batch sizes it was called with."""

    def __init__(self, module):
        super().__init__()
        self.module, self.batches = module, []

    def forward(self, x, *args):
        self.batches.append(len(x))
        return self.module(x, *args)


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_guidance_is_the_formula_with_two_calls(style):
    unet, net, (x, t, context, hint) = mini_unet(style), mini_control(style), corner(style)
    negative = stored("inputs")[f"{style}/uncond"]

    def output(context):
        return unet(x, t, context, [0.8 * r for r in net(x, t, context, hint)])

    want = output(negative) + 7.5 * (output(context) - output(negative))
    counted = Counted(unet)
    got = guided(counted, context, negative, cfg=7.5, controls=[Control(net, hint, scale=0.8)])(x, t)
    assert relative(got, want) < 1e-5
    assert counted.batches == [4]  # both branches at once


@torch.no_grad()
def test_without_guidance_only_the_prompt_is_computed():
    unet, net, (x, t, context, hint) = mini_unet("sd1"), mini_control("sd1"), corner("sd1")
    counted = Counted(unet)
    nothing = torch.full_like(context, float("nan"))
    output = guided(counted, context, nothing, cfg=1, controls=[Control(net, hint)])(x, t)
    assert torch.equal(output, unet(x, t, context, net(x, t, context, hint)))
    assert counted.batches == [2]


@torch.no_grad()
def test_guidance_without_controls_is_that_of_the_unet_alone():
    unet, (x, t, context, _) = mini_unet("sd1"), corner("sd1")
    negative = stored("inputs")["sd1/uncond"]
    want = unet(x, t, negative) + 3 * (unet(x, t, context) - unet(x, t, negative))
    assert relative(guided(unet, context, negative, cfg=3)(x, t), want) < 1e-5


@torch.no_grad()
def test_a_hint_is_encoded_once_for_all_steps():
    net, (x, t, context, hint) = mini_control("sd1"), corner("sd1")
    calls = []
    handle = net.hint_encoder.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    denoise = guided(mini_unet("sd1"), context, context.flip(0), cfg=9, controls=[Control(net, hint)])
    for step in range(3):
        denoise(x, t - step)
    handle.remove()
    assert calls == [2]


@torch.no_grad()
def test_one_hint_serves_a_whole_batch():
    unet, net, (x, t, context, hint) = mini_unet("sd1"), mini_control("sd1"), corner("sd1")
    one, repeated = hint[:1], hint[:1].repeat(2, 1, 1, 1)
    outputs = [guided(unet, context, context, cfg=2, controls=[Control(net, h)])(x, t) for h in (one, repeated)]
    assert relative(*outputs) < 3e-6  # batches of one and of two may be summed in another order


@torch.no_grad()
def test_nothing_that_the_caller_owns_is_changed():
    unet, net, (x, t, context, hint) = mini_unet("sd1"), mini_control("sd1"), corner("sd1")
    negative = context.flip(0)
    residuals = net(x, t, context, hint)
    controls = [Control(net, hint), Control(net, hint, scale=0.3)]
    own = [x, t, context, negative, hint, *residuals, *unet.state_dict().values(), *net.state_dict().values()]
    before, residuals_before, controls_before = [tensor.clone() for tensor in own], [*residuals], [*controls]

    unet(x, t, context, residuals)
    encoded = unet.encoder(x, t, context)
    kept = [features.clone() for features in (*encoded.skips, encoded.middle, encoded.time)]
    unet.decode(encoded, context, residuals)
    denoise = guided(unet, context, negative, cfg=2, controls=controls)
    first = denoise(x, t)

    assert all(torch.equal(now, then) for now, then in zip(own, before, strict=True))
    assert all(now is then for now, then in zip(residuals, residuals_before, strict=True))
    assert controls == controls_before
    assert all(torch.equal(a, b) for a, b in zip((*encoded.skips, encoded.middle, encoded.time), kept, strict=True))
    assert torch.equal(denoise(x, t), first)  # nor does a step leave a trace


# ------------------------------------------------------------------------------------------------------ whole samples


def mini_denoiser(style, cfg):
    _, _, context, hint = inputs(style)
    negative = stored("inputs")[f"{style}/uncond"]
    return guided(mini_unet(style), context, negative, cfg, [Control(mini_control(style), hint)])


@torch.no_grad()
@pytest.mark.parametrize("style, cfg", [("sd1", 9), ("sd2", 1)])
def test_a_ddim_sample_is_the_published_one(style, cfg):
    """Three of its ten steps are stored: the first, the fifth and the last."""
    schedule = Schedule(MINIS[style].schedule)
    found = []
    sample_loop(
        "ddim",
        mini_denoiser(style, cfg),
        stored("inputs")["x"],
        ddim_timesteps(schedule, 10),
        schedule,
        on_step=lambda i, x, x0: found.append(x),
    )
    for step, want in zip((0, 4, 9), stored("sampling")[f"{style}/ddim_cfg{cfg}_control"], strict=True):
        assert relative(found[step], want) < 5e-5, step


@torch.no_grad()
def test_a_dpmpp_sample_is_the_published_one():
    schedule = Schedule(MINIS["sd1"].schedule)
    timesteps = timesteps_for("dpm++", schedule, 10)
    x = sample_loop("dpm++", mini_denoiser("sd1", cfg=9), stored("inputs")["x"], timesteps, schedule)
    assert relative(x, stored("sampling")["sd1/dpmpp"]) < 5e-5
