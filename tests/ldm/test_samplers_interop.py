"""The samplers beside diffusers' schedulers, with a network that is only a formula. Runs where
tests/requirements-interop.txt is installed.

diffusers' Euler, Heun and DPM++ SDE keep x / sqrt(a). Between whole timesteps they interpolate sigma, not its logarithm
as k-diffusion does and we do: there they are given our levels, after a look at theirs.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from ldm.config import ScheduleConfig
from ldm.samplers import SAMPLERS, sample_loop, timesteps_for
from ldm.schedule import Schedule

pytest.importorskip("diffusers", reason="tests/requirements-interop.txt is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCHEDULERS = {
    "dpm++": "dpmsolver_multistep.DPMSolverMultistep",
    "dpm++-sde": "dpmsolver_sde.DPMSolverSDE",
    "euler": "euler_discrete.EulerDiscrete",
    "euler-a": "euler_ancestral_discrete.EulerAncestralDiscrete",
    "heun": "heun_discrete.HeunDiscrete",
    "unipc": "unipc_multistep.UniPCMultistep",
    "lcm": "lcm.LCM",
}
SCALED = ("dpm++-sde", "euler", "euler-a", "heun")  # those that keep x / sqrt(a)
DOUBLED = ("dpm++-sde", "heun")  # their timesteps list both evaluations of a step
SAMPLERS_THERE = [name for name in SAMPLERS if name not in ("ddim", "ddpm")]
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


def network(x, t):
    """Any function of x and of the timestep, which some of diffusers' schedulers round."""
    return torch.tanh(1.5 * x + x.roll(1, -1) - 0.3 * x.flip(-2)) + 0.2 * torch.sin(t.float().round().mean() / 90)


def randn(seed):
    return torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(seed))


def draws():
    """Noise, each time other: the same for both sides."""
    seeds = iter(range(1, 1000))
    return lambda *_, **__: randn(next(seeds))


def brownian(sigmas, noise):
    """diffusers' noise for DPM++ SDE: first from sigma to the middle of a step, then from sigma to its end."""
    parts = []

    def sampler(sigma, sigma_next):
        parts.append((abs(sigma - sigma_next) ** 0.5 * noise(), sigma_next))
        if len(parts) % 2:
            return parts[-1][0] / abs(sigma - sigma_next) ** 0.5
        (first, middle), (second, _) = parts[-2:]
        second = second / abs(sigma - sigma_next) ** 0.5 * abs(middle - sigma_next) ** 0.5
        return (first + second) / abs(sigma - sigma_next) ** 0.5

    return sampler


def their_scheduler(name, schedule, steps, monkeypatch):
    base, zero_snr = name.removesuffix("-karras"), schedule.config.zero_terminal_snr
    file, kind = SCHEDULERS[base].split(".")
    torchsde = ModuleType("torchsde")  # an optional package, which would draw the noise that we give
    torchsde.__spec__ = ModuleSpec("torchsde", None)
    torchsde.BrownianTree = None
    monkeypatch.setitem(sys.modules, "torchsde", torchsde)
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
    settings = {"prediction_type": PREDICTIONS[schedule.config.prediction], "beta_schedule": "scaled_linear"}
    settings |= {"timestep_spacing": "trailing" if zero_snr else "linspace"} if base != "lcm" else {}
    settings |= {"use_karras_sigmas": True} if name != base and base != "euler-a" else {}
    settings |= {"rescale_betas_zero_snr": True} if zero_snr else {}
    settings |= {"clip_sample": False} if base == "lcm" else {}
    scheduler = getattr(module, f"{kind}Scheduler")(beta_start=0.00085, beta_end=0.012, **settings)
    scheduler.set_timesteps(steps)
    for file in ("euler_ancestral_discrete", "lcm"):
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
        monkeypatch.setattr(module, "randn_tensor", draws())
    return scheduler


def give_levels(scheduler, name, schedule, timesteps):
    """Our noise levels to one of SCALED, if it has nearly the same."""
    ratios = [(1 / max(schedule.alpha_bar_at(t), 2**-24) - 1) ** 0.5 for t in timesteps]
    if name.startswith(DOUBLED):
        middles = [t for t in timesteps[1:]]
        if name.startswith("dpm++-sde"):
            pairs = zip(ratios, ratios[1:], strict=False)
            middles = [schedule.timestep_at(1 / (1 + sigma * sigma_next)) for sigma, sigma_next in pairs]
            timesteps = [t for pair in zip(timesteps, [*middles, 0], strict=True) for t in pair][:-1]
        else:
            timesteps = [timesteps[0], *(t for t in timesteps[1:] for _ in range(2))]
        ratios = [ratios[0], *(ratio for ratio in ratios[1:] for _ in range(2))]
    sigmas, timesteps = torch.tensor([*ratios, 0.0]), torch.tensor(timesteps)
    if name != "euler-a-karras":  # which diffusers does not have
        exact = name.endswith("karras") or schedule.config.zero_terminal_snr
        torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=2e-5 if exact else 0.05, atol=0)
        torch.testing.assert_close(scheduler.timesteps.float(), timesteps.float(), rtol=0, atol=1e-3 if exact else 4)
    scheduler.sigmas, scheduler.timesteps = sigmas, timesteps.float()


def run_theirs(scheduler, name, x, skip):
    scaled, first = name.startswith(SCALED), 2 * skip if name.startswith(DOUBLED) else skip
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    x = x * (scheduler.sigmas[first] ** 2 + 1) ** 0.5 if scaled else x
    for t in scheduler.timesteps[first:]:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize("steps, skip", [(5, 0), (20, 0), (7, 3)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS_THERE)
def test_samplers_are_those_of_diffusers(name, prediction, steps, skip, monkeypatch):
    compare(name, Schedule(ScheduleConfig(prediction)), steps, skip, monkeypatch, 1e-5)


@pytest.mark.parametrize("name", ["dpm++", "euler", "euler-a", "unipc", "lcm"])
def test_and_with_zero_terminal_snr(name, monkeypatch):
    """There noise is only 4096 times as strong as the data at first, and not the only thing."""
    compare(name, Schedule(ScheduleConfig("v", zero_terminal_snr=True)), 7, 0, monkeypatch, 5e-3)


def compare(name, schedule, steps, skip, monkeypatch, tolerance):
    scheduler = their_scheduler(name, schedule, steps, monkeypatch)
    timesteps = timesteps_for(name, schedule, steps)
    if name.startswith(SCALED):
        give_levels(scheduler, name, schedule, timesteps)
    else:
        torch.testing.assert_close(scheduler.timesteps.float(), torch.tensor(timesteps).round().float())
    scheduler.noise_sampler = brownian(scheduler.sigmas, draws()) if name.startswith("dpm++-sde") else None
    ours = sample_loop(name, lambda x, t, _: network(x, t), randn(0), timesteps[skip:], schedule, noise=draws())
    theirs = run_theirs(scheduler, name, randn(0), skip)
    assert (ours - theirs).norm() / theirs.norm() < tolerance
