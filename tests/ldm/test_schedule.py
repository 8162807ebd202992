"""The forward process against the released code's numbers, and at its ends."""

from pathlib import Path

import pytest
import torch
from minis import relative
from safetensors.torch import load_file

from ldm.config import ScheduleConfig
from ldm.schedule import Schedule

FIXTURES = Path(__file__).parents[1] / "fixtures"
SCHEDULES = [ScheduleConfig("eps"), ScheduleConfig("v"), ScheduleConfig("x0"), ScheduleConfig("v", True)]
SCHEDULES += [ScheduleConfig("x0", True)]


def batch(schedule, dtype=torch.float32):
    """x0, noise and timesteps at both ends and between."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 4, 6, 5, generator=generator).to(dtype)
    return x0, noise, torch.tensor([0, 1, 500, schedule.config.timesteps - 1])


def test_tables_are_those_of_the_released_checkpoints():
    schedule, want = Schedule(ScheduleConfig()), load_file(FIXTURES / "schedule.safetensors")
    assert relative(schedule.betas, want["betas_f64"]) < 1e-12
    assert relative(schedule.alphas_cumprod, want["alphas_cumprod"]) < 2e-7
    assert relative(schedule.alpha, want["sqrt_alphas_cumprod"]) < 2e-7
    assert relative(schedule.sigma, want["sqrt_one_minus_alphas_cumprod"]) < 2e-7
    # Near t = 0 a sigma made from the fp32 alphas_cumprod is off by 1e-5.
    torch.testing.assert_close(schedule.sigma, want["sqrt_one_minus_alphas_cumprod"], rtol=2e-7, atol=0)
    assert schedule.alphas_cumprod.dtype == schedule.alpha.dtype == schedule.sigma.dtype == torch.float32


def test_conversions_are_those_of_the_released_code():
    g = load_file(FIXTURES / "diffusion_algebra.safetensors")
    t, x, output = g["t"], g["q_sample"], g["model_out"]
    eps, v = Schedule(ScheduleConfig("eps")), Schedule(ScheduleConfig("v"))
    assert relative(eps.q_sample(g["x0"], t, g["noise"]), x) < 1e-6
    assert relative(v.target(g["x0"], t, g["noise"]), g["v_target"]) < 1e-6
    assert relative(eps.to_x0(x, t, output), g["x0_from_eps"]) < 1e-6
    assert relative(v.to_x0(x, t, output), g["x0_from_v"]) < 1e-6
    assert relative(v.to_eps(x, t, output), g["eps_from_v"]) < 1e-6


@pytest.mark.parametrize("config", SCHEDULES)
def test_the_target_gives_x0_and_noise_back(config):
    schedule = Schedule(config)
    x0, noise, t = batch(schedule)
    x, output = schedule.q_sample(x0, t, noise), schedule.target(x0, t, noise)
    torch.testing.assert_close(schedule.to_x0(x, t, output), x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(schedule.to_eps(x, t, output), noise, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(config, dtype):
    """The result in half precision is the fp32 result of the same halves, rounded: nothing inside is half."""
    schedule = Schedule(config)
    x0, noise, t = batch(schedule, dtype)
    for f in (schedule.to_x0, schedule.to_eps):
        assert torch.equal(f(x0, t, noise), f(x0.float(), t, noise.float()).to(dtype))
    assert torch.equal(schedule.q_sample(x0, t, noise), schedule.q_sample(x0.float(), t, noise.float()).to(dtype))
    target = schedule.target(x0.float(), t, noise.float())
    assert torch.equal(schedule.target(x0, t, noise), target.to(dtype))
    assert schedule.to_x0(x0.float(), t, noise).dtype == schedule.to_eps(x0.float(), t, noise).dtype == torch.float32


@pytest.mark.parametrize("config", SCHEDULES)
def test_tables_follow_the_device_of_x(config):
    schedule = Schedule(config)
    x, t = torch.empty(4, 4, 8, 8, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    for y in (schedule.q_sample(x, t, x), schedule.target(x, t, x), schedule.to_x0(x, t, x), schedule.to_eps(x, t, x)):
        assert y.device.type == "meta" and y.shape == x.shape


@pytest.mark.parametrize("config", SCHEDULES)
def test_arguments_stay_as_they_are(config):
    schedule = Schedule(config)
    x, y, t = batch(schedule)
    before = x.clone(), y.clone(), t.clone()
    schedule.q_sample(x, t, y), schedule.target(x, t, y), schedule.to_x0(x, t, y), schedule.to_eps(x, t, y)
    assert all(torch.equal(a, b) for a, b in zip((x, y, t), before, strict=True))


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step():
    plain, zero = Schedule(ScheduleConfig("v")), Schedule(ScheduleConfig("v", zero_terminal_snr=True))
    assert zero.alphas_cumprod[-1] == 0 and zero.alpha[-1] == 0 and zero.sigma[-1] == 1
    assert zero.alphas_cumprod[0] == plain.alphas_cumprod[0]
    assert (zero.alphas_cumprod.diff() < 0).all() and (zero.betas > 0).all() and (zero.betas <= 1).all()
    # Algorithm 1 shifts and scales sqrt(alpha bar), so its differences are scaled alike.
    ratio = zero.alpha.double().diff() / plain.alpha.double().diff()
    torch.testing.assert_close(ratio, ratio.mean().expand(999), rtol=2e-3, atol=0)


def test_errors_are_one_clear_sentence():
    with pytest.raises(ValueError, match='impossible with prediction "eps": use "v" or "x0"'):
        Schedule(ScheduleConfig("eps", zero_terminal_snr=True))
    with pytest.raises(ValueError, match="prediction is 'epsilon', expected one of eps, v, x0"):
        Schedule(ScheduleConfig("epsilon"))
