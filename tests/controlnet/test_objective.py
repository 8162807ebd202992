"""The training loss against the published code's numbers, and where its gradients go."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from minis import MINIS, inputs, mini_unet, new_mini_control, relative, stored
from small import SMALLEST

from controlnet.ablations import only_middle
from controlnet.layouts import control_map
from controlnet.model import ControlNet
from controlnet.objective import (
    ControlLoss,
    Draws,
    EncodedPairs,
    denoising_loss,
    loss_inputs,
    min_snr_weights,
    seeded,
)
from controlnet.training.lr_schedules import constant_schedule
from controlnet.training.optimisation import Optimisation
from controlnet.training.validation import zero_conv_norms
from ldm.checkpoints.key_maps import unet_map
from ldm.schedule import Schedule
from ldm.unet import UNet

CPU = torch.device("cpu")


def published_training(style, unlocked=True):
    """The miniature's loss, with a decoder that learns too or does not, and what its published inputs give."""
    g, (_, _, context, hint) = stored("inputs"), inputs(style)
    unet, control = copy.deepcopy(mini_unet(style)), new_mini_control(style)
    unet.decoder.requires_grad_(unlocked)
    loss = ControlLoss(unet, control, Schedule(MINIS[style].schedule))
    return loss, lambda: loss(g["train/z0"], g["train/noise"], g["train/t"], context, hint)


def published_gradients(loss):
    """Of all parameters that have one, by their keys in the original layout."""
    maps = {"control": control_map(loss.unet.config, loss.control.config), "unet": unet_map(loss.unet.config)}
    gradients = {}
    for part, key_map in maps.items():
        parameters = dict(getattr(loss, part).named_parameters())
        sources = key_map.sources(parameters)
        gradients |= {sources[name].key: p.grad for name, p in parameters.items() if p.grad is not None}
    return gradients


def trained_by(loss):
    return [(name, parameter) for name, parameter in loss.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("style, how", [("sd1", ""), ("sd2", ""), ("sd2", "only_mid/")])
def test_loss_and_gradients_are_the_published_ones(style, how):
    """Of the control and of the decoder. With the middle alone the 12 other zero convolutions have no gradient."""
    g, (loss, compute) = stored("training"), published_training(style)
    if how:
        only_middle(loss.control)
    value = compute()
    value.backward()
    assert value.item() == pytest.approx(g[f"{style}/{how}loss"].item(), rel=1e-5)

    gradients, norms = published_gradients(loss), g[f"{style}/{how}gradnorms"].tolist()
    assert len(gradients) == 340 - 24 * bool(how) + 388
    for key, want in zip(sorted(gradients), norms, strict=True):
        # Some are nothing but rounding: a bias in front of a norm of one channel a group.
        assert gradients[key].norm().item() == pytest.approx(want, rel=1e-3, abs=5e-8), key

    whole = [name for name in g if name.startswith(f"{style}/grad/") and not how]
    assert len(whole) == (0 if how else 5)
    for name in whole:
        assert relative(gradients[name.removeprefix(f"{style}/grad/")], g[name]) < 1e-3, name


@pytest.mark.parametrize("style, how", [("sd1", "unlocked"), ("sd2", "locked")])
def test_losses_along_adamw_steps_are_the_published_ones(style, how):
    loss, compute = published_training(style, how == "unlocked")
    optimisation = Optimisation(trained_by(loss), 1e-4, constant_schedule(warmup=0), CPU, clip=float("inf"))
    losses = []
    for _ in range(4):
        value = compute()
        optimisation.backward(value)
        optimisation.finish(optimisation.update())
        losses.append(value.item())
    assert losses == pytest.approx(stored("training")[f"{style}/adamw_{how}"].tolist(), rel=1e-5)


# ------------------------------------------------------------------------------------ on a small random base, from zero


def small_unet():
    torch.manual_seed(0)
    return UNet(SMALLEST.unet).requires_grad_(False)


def small_batch():
    """z0, noise, t, context and hint of two pictures."""
    generator = torch.Generator().manual_seed(1)
    z0, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, SMALLEST.unet.context_width, generator=generator)
    return z0, noise, torch.tensor([600, 80]), context, torch.rand(2, 3, 64, 64, generator=generator)


def small_loss(unet, control):
    return ControlLoss(unet, control, Schedule(SMALLEST.schedule))(*small_batch())


def test_the_loss_is_the_mean_squared_error_to_the_schedules_target():
    unet, schedule = small_unet(), Schedule(SMALLEST.schedule)
    z0, noise, t, context, _ = small_batch()
    output = unet(schedule.q_sample(z0, t, noise), t, context)
    want = F.mse_loss(output, schedule.target(z0, t, noise))
    assert torch.equal(denoising_loss(schedule, output, z0, noise, t), want)


def test_the_loss_of_a_fresh_control_is_the_bases():
    unet, (z0, noise, t, context, _) = small_unet(), small_batch()
    schedule = Schedule(SMALLEST.schedule)
    want = denoising_loss(schedule, unet(schedule.q_sample(z0, t, noise), t, context), z0, noise, t)
    assert torch.equal(small_loss(unet, ControlNet.from_unet(unet)), want)


def names_with_gradient(control):
    """The parameters whose gradient is not exactly zero."""
    return {name for name, parameter in control.named_parameters() if torch.count_nonzero(parameter.grad) > 0}


def test_gradients_reach_a_fresh_control_from_its_end():
    """A zero convolution lets nothing through to what lies before it until its own first step."""
    unet = small_unet()
    control = ControlNet.from_unet(unet)
    optimisation = Optimisation(control.named_parameters(), 1e-3, constant_schedule(warmup=0), CPU)
    everything = {name for name, _ in control.named_parameters()}
    output_zero_convs = {name for name in everything if "zero_conv" in name}
    trunk = {name for name in everything if name.startswith("encoder.")}
    last_of_hint_encoder = {f"hint_encoder.convs.{len(control.hint_encoder.convs) - 1}.{p}" for p in ("weight", "bias")}

    reached = []
    for _ in range(3):
        optimisation.backward(small_loss(unet, control))
        reached.append(names_with_gradient(control))
        optimisation.finish(optimisation.update())
    assert len(output_zero_convs) == 2 * (len(control.encoder.blocks) + 1)
    assert reached[0] == output_zero_convs
    assert reached[1] == output_zero_convs | trunk | last_of_hint_encoder
    assert reached[2] == everything


def test_a_step_changes_the_control_alone():
    unet = small_unet()
    control = ControlNet.from_unet(unet)
    optimisation = Optimisation(control.named_parameters(), 1e-3, constant_schedule(warmup=0), CPU)
    unet_before, control_before = copy.deepcopy(unet.state_dict()), copy.deepcopy(control.state_dict())
    for _ in range(2):
        optimisation.backward(small_loss(unet, control))
        assert all(parameter.grad is None for parameter in unet.parameters())
        optimisation.finish(optimisation.update())
    assert all(torch.equal(value, unet_before[key]) for key, value in unet.state_dict().items())
    assert not torch.equal(control.zero_convs[0].weight, control_before["zero_convs.0.weight"])
    assert not torch.equal(control.encoder.blocks[0].conv.weight, control_before["encoder.blocks.0.conv.weight"])


def test_the_locked_encoder_keeps_no_activations_and_the_decoder_does(monkeypatch):
    """Even with a base that is not locked, which would otherwise remember everything."""
    unet = small_unet().requires_grad_(True)
    seen = []

    def spy(encoded, context, control):
        output = UNet.decode(unet, encoded, context, control)
        seen.append((encoded, control, output))
        return output

    monkeypatch.setattr(unet, "decode", spy)
    small_loss(unet, ControlNet.from_unet(unet)).backward()
    ((encoded, residuals, output),) = seen
    assert not any(features.requires_grad for features in (*encoded.skips, encoded.middle, encoded.time))
    assert all(residual.grad_fn is not None for residual in residuals)
    assert output.grad_fn is not None
    assert all(parameter.grad is None for parameter in unet.encoder.parameters())


def test_only_the_middle_learns_and_the_other_residuals_stay_zero():
    unet = small_unet()
    control = ControlNet.from_unet(unet)
    only_middle(control)
    loss = ControlLoss(unet, control, Schedule(SMALLEST.schedule))
    optimisation = Optimisation(trained_by(loss), 1e-3, constant_schedule(0), CPU)
    for _ in range(2):
        optimisation.backward(loss(*small_batch()))
        optimisation.finish(optimisation.update())
    *skips, middle = zero_conv_norms(control)
    assert skips == [0] * len(control.zero_convs) and middle > 0
    optimisation.backward(loss(*small_batch()))
    assert all(p.grad is not None for p in control.encoder.parameters())


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_caps_what_the_error_of_x0_counts(prediction):
    """Hang et al., Eq. 8: whatever the network predicts, the error of its x0 weighs min(SNR, gamma)."""
    schedule = Schedule(replace(SMALLEST.schedule, prediction=prediction, zero_terminal_snr=False))
    generator = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, 4, 4, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([10, 200, 600, 950])
    x = schedule.q_sample(x0, t, noise)
    target = schedule.target(x0, t, noise)
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    ours = min_snr_weights(schedule, t, 5.0) * error.square().mean(dim=(1, 2, 3))
    x0_error = schedule.to_x0(x, t, target + error) - schedule.to_x0(x, t, target)
    torch.testing.assert_close(ours, snr.clamp(max=5) * x0_error.square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=0)


def test_the_weighted_loss_is_the_weighted_mean_of_each_pictures():
    unet, schedule = small_unet(), Schedule(SMALLEST.schedule)
    control, batch = ControlNet.from_unet(unet), small_batch()
    weights = min_snr_weights(schedule, batch[2], 5.0)
    loss = ControlLoss(unet, control, schedule)
    each = [loss(*(part[i : i + 1] for part in batch)) for i in range(2)]
    want = sum(w * loss for w, loss in zip(weights, each, strict=True)) / 2
    torch.testing.assert_close(ControlLoss(unet, control, schedule, min_snr=5.0)(*batch), want)


@pytest.mark.parametrize("unlocked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_what_is_trained_is_under_autocast(dtype, unlocked):
    """The locked half computes in its own type; gradients come back through it, and the loss is fp32."""
    unet = small_unet()
    control = ControlNet.from_unet(unet)
    for zero_conv in (*control.zero_convs, control.middle_zero_conv, control.hint_encoder.convs[-1]):
        torch.nn.init.normal_(zero_conv.weight, std=0.1)
    loss, batch = ControlLoss(unet, control, Schedule(SMALLEST.schedule)), [part[:1] for part in small_batch()]
    want = loss(*batch)
    unet.to(dtype)
    unet.decoder.to(torch.float32 if unlocked else dtype).requires_grad_(unlocked)
    parts, found = {"encoder": unet.encoder, "decoder": unet.decoder, "copy": control.encoder}, {}
    for part, module in parts.items():
        block = module.blocks[-1]
        block.register_forward_hook(
            lambda block, args, y, part=part: found.update({part: (torch.is_autocast_enabled("cpu"), y.dtype)})
        )
    with torch.autocast("cpu", dtype):
        value = loss(*batch)
    assert found == {"encoder": (False, dtype), "copy": (True, dtype), "decoder": (unlocked, dtype)}
    assert value.dtype == torch.float32 and value.item() == pytest.approx(want.item(), rel=0.01)
    value.backward()
    assert names_with_gradient(control) == {name for name, _ in control.named_parameters()}


# ------------------------------------------------------------------------------------------------------ what is drawn


def test_a_position_says_everything_that_is_random():
    draws = Draws((4, 8, 8), timesteps=1000, prompt_dropout=0.5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(draws([5]), draws([5]), strict=True))
    drawn = draws(range(400))
    assert all(torch.equal(one[0], many[7]) for one, many in zip(draws([7]), drawn, strict=True))
    assert drawn.noise.mean().abs() < 0.02 and drawn.noise.std() == pytest.approx(1, abs=0.02)
    assert not torch.equal(drawn.noise, drawn.posterior_noise)
    assert drawn.t.min() < 30 and drawn.t.max() > 970 and drawn.t.float().mean() == pytest.approx(500, abs=60)
    assert 0.4 < drawn.dropped.float().mean() < 0.6


def test_a_step_draws_the_same_whatever_was_drawn_before():
    first = torch.randn(3, generator=seeded(1, 5))
    assert torch.equal(first, torch.randn(3, generator=seeded(1, 5)))
    assert not torch.equal(first, torch.randn(3, generator=seeded(5, 1)))
    assert not torch.equal(first, torch.randn(3, generator=seeded(1, 6)))


def test_the_loss_gets_a_sample_of_the_posterior_and_no_prompt_where_it_is_dropped():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 8, 4, 8, 8, generator=generator)
    encoded = EncodedPairs(mean, logvar, torch.randn(8, 77, 16, generator=generator))
    empty, given = torch.randn(1, 77, 16, generator=generator), torch.rand(8, 3, 64, 64, generator=generator)
    drawn = Draws((4, 8, 8), 1000, 0.5, 0)(range(8))
    assert 0 < drawn.dropped.sum() < 8
    z0, noise, t, context, hint = loss_inputs(encoded, given, drawn, 0.2, empty, CPU)
    torch.testing.assert_close(z0, 0.2 * (mean + torch.exp(logvar / 2) * drawn.posterior_noise))
    for i in range(8):
        assert torch.equal(context[i], empty[0] if drawn.dropped[i] else encoded.context[i])
    assert torch.equal(hint, given) and torch.equal(noise, drawn.noise) and torch.equal(t, drawn.t)
