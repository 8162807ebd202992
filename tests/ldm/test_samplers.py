"""The samplers against stored numbers, and against data whose exact denoiser and solution are known."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from minis import relative
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.config import ScheduleConfig
from ldm.samplers import (
    SAMPLERS,
    Prediction,
    ddim_sigma,
    ddim_step,
    ddim_timesteps,
    ddpm_step,
    dpmpp_step,
    even_timesteps,
    heun_step,
    lcm_timesteps,
    sample,
    sample_loop,
    timesteps_for,
    unipc_step,
)
from ldm.schedule import Schedule

FIXTURES = Path(__file__).parents[1] / "fixtures"
PLAIN, ZERO_SNR = Schedule(ScheduleConfig("v")), Schedule(ScheduleConfig("v", zero_terminal_snr=True))
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
DPMPP = load_file(FIXTURES / "dpmpp_given_outputs.safetensors")
with safe_open(FIXTURES / "dpmpp_given_outputs.safetensors", "pt") as file:
    DPMPP_CASES = {name: json.loads(settings) for name, settings in file.metadata().items()}


DRAWS = {"ddim": 5, "ddpm": 4, "euler-a": 4, "lcm": 4, "dpm++-sde": 8}  # of 5 steps, ddim's with an eta


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_source(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def knows(x0, schedule):
    """The perfect denoiser of a data set with the one picture x0."""

    def denoise(x, t, timestep):
        a = schedule.alpha_bar_at(timestep)
        alpha, sigma = a**0.5, (1 - a) ** 0.5
        if not t.is_floating_point():
            alpha, sigma = schedule.alpha[t[0]], schedule.sigma[t[0]]
        return schedule.target(x0, t, (x - alpha * x0) / sigma)

    return denoise


MEAN, DEVIATION = 0.7, 0.8  # of the Gaussian data


def gaussian_x0(x, a):
    """E[x0 | x] for data of N(MEAN, DEVIATION^2), independent pixels."""
    return MEAN + a**0.5 * DEVIATION**2 / (a * DEVIATION**2 + 1 - a) * (x - a**0.5 * MEAN)


def gaussian_flow(x, a, a_end):
    """Where the probability-flow ODE takes x from level a to level a_end: the standardised x stays."""
    z = (x - a**0.5 * MEAN) / (a * DEVIATION**2 + 1 - a) ** 0.5
    return a_end**0.5 * MEAN + (a_end * DEVIATION**2 + 1 - a_end) ** 0.5 * z


def gaussian_denoiser(schedule):
    def denoise(x, t, timestep):
        a = schedule.alpha_bar_at(timestep) if t.is_floating_point() else schedule.alpha[t[0]].item() ** 2
        x0 = gaussian_x0(x, a)
        # v = (alpha x - x0) / sigma, which is also right at alpha = 0.
        return (a**0.5 * x - x0) / (1 - a) ** 0.5

    return denoise


# ---------------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize("steps", [1, 7, 10, 20, 30, 50])
@pytest.mark.parametrize("eta", [0, 1])
def test_ddim_schedule_is_the_released_one(steps, eta):
    g = load_file(FIXTURES / "ddim_schedule.safetensors")
    want = {k: g[f"S{steps}_eta{eta}/{k}"] for k in ("timesteps", "alphas", "alphas_prev", "sigmas")}
    timesteps = ddim_timesteps(PLAIN, steps)
    assert timesteps[::-1] == want["timesteps"].tolist()
    a = [PLAIN.alphas_cumprod[0].item(), *PLAIN.alphas_cumprod[timesteps[::-1]].tolist()]
    sigmas = [ddim_sigma(now, following, eta) for following, now in pairwise(a)]
    torch.testing.assert_close(torch.tensor(a[1:]).double(), want["alphas"], rtol=3e-6, atol=0)
    torch.testing.assert_close(torch.tensor(a[:-1]).double(), want["alphas_prev"], rtol=3e-6, atol=0)
    torch.testing.assert_close(torch.tensor(sigmas).double(), want["sigmas"], rtol=5e-5, atol=0)


def test_ddim_timesteps_for_every_number_of_steps():
    repaired = []
    for steps in range(1, 1001):
        timesteps = ddim_timesteps(PLAIN, steps)
        assert timesteps == sorted(set(timesteps), reverse=True), steps
        assert timesteps[0] <= 999 and timesteps[-1] >= 0
        released = list(range(0, 1000, 1000 // steps))
        if released[-1] + 1 < 1000:
            assert timesteps[::-1] == [t + 1 for t in released], steps
        else:
            assert len(timesteps) == steps
            assert all(high - low <= 1000 // steps + 1 for high, low in pairwise(timesteps))
            repaired.append(steps)
    # Where the released code fails, as its users found.
    assert repaired == [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]


def test_even_and_trailing_timesteps_for_every_number_of_steps():
    for steps in range(1, 1001):
        lists = [
            even_timesteps(PLAIN, steps),
            *(SAMPLERS[name].timesteps(ZERO_SNR, steps) for name in ("ddim", "heun")),
        ]
        for timesteps in [*lists, *([lcm_timesteps(PLAIN, steps)] if steps <= 50 else [])]:
            assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
            assert timesteps == sorted(set(timesteps), reverse=True), steps
    for name in SAMPLERS:
        karras = name.endswith("karras")
        assert karras or timesteps_for(name, ZERO_SNR, 5) == [999, 799, 599, 399, 199]
        assert karras or name == "lcm" or timesteps_for(name, PLAIN, 1000) == list(range(999, -1, -1))


def test_timesteps_between_are_those_of_k_diffusion():
    """The logarithm of sigma is linear between whole timesteps; Karras' levels are even in sigma^(1/7)."""
    logs = ((1 - PLAIN.alphas_cumprod.double()) / PLAIN.alphas_cumprod).sqrt().log()
    between = {999.0: logs[999], 749.25: 0.75 * logs[749] + 0.25 * logs[750], 499.5: logs[499:501].mean(), 0.0: logs[0]}
    ramp = torch.linspace(logs[999] / 7, logs[0] / 7, 5)  # only its ends are used
    roots = torch.linspace(ramp[0].exp(), ramp[-1].exp(), 5, dtype=torch.float64)
    for name, some in (("euler", between), ("euler-karras", dict(enumerate((7 * roots.log()).tolist())))):
        timesteps = timesteps_for(name, PLAIN, 5)
        levels = [PLAIN.alpha_bar_at(t) for t in timesteps]
        sigmas = [(1 / levels[timesteps.index(t) if name == "euler" else t] - 1) ** 0.5 for t in some]
        assert sigmas == pytest.approx([math.exp(value) for value in some.values()], rel=1e-6)
        assert [PLAIN.timestep_at(a) for a in levels] == timesteps and all(isinstance(t, float) for t in timesteps)
        for t, a in zip(timesteps, levels, strict=True):  # in x at a timestep, too
            x = PLAIN.q_sample(torch.ones(1, 1, 1, 1), torch.tensor([t]), 2 * torch.ones(1, 1, 1, 1)).item()
            assert x == pytest.approx(a**0.5 + 2 * (1 - a) ** 0.5, rel=2e-6)
    first, *rest = timesteps_for("euler-karras", ZERO_SNR, 5)
    from_80 = torch.linspace(80 ** (1 / 7), ZERO_SNR.noise_ratios[0] ** (1 / 7), 5, dtype=torch.float64) ** 7
    assert first == 999
    assert [(1 / ZERO_SNR.alpha_bar_at(t) - 1) ** 0.5 for t in rest] == pytest.approx(from_80[1:].tolist(), rel=1e-6)


@pytest.mark.parametrize("case", ["linspace_eps_5", "linspace_eps_10", "linspace_eps_20", "linspace_v_10"])
def test_even_timesteps_are_those_of_the_stored_runs(case):
    want = DPMPP[f"{case}/timesteps"].tolist()
    assert even_timesteps(PLAIN, len(want)) == want


def test_trailing_timesteps_are_those_of_the_stored_runs():
    assert timesteps_for("dpm++", ZERO_SNR, 20) == DPMPP["trailing_v_20/timesteps"].tolist()
    ddpm = load_file(FIXTURES / "ddpm.safetensors")
    assert timesteps_for("ddpm", ZERO_SNR, 50) == ddpm["epsilon_trailing_50/timesteps"].tolist()


# ---------------------------------------------------------------------------------------------------- stored numbers


@pytest.mark.parametrize("case", sorted(DPMPP_CASES))
def test_dpmpp_steps_on_given_outputs(case):
    """All stored cases, also Karras' levels and another end, which `sample` does not offer: by the step alone."""
    settings, sigmas = DPMPP_CASES[case], DPMPP[f"{case}/sigmas"].double()
    a = (1 / (1 + sigmas**2)).tolist()  # stored as sigma / alpha
    x, past = DPMPP["x_T"], ()
    for i, output in enumerate(DPMPP[f"{case}/model_outputs"]):
        alpha, sigma = a[i] ** 0.5, (1 - a[i]) ** 0.5
        v = settings["prediction_type"] == "v_prediction"
        x0 = alpha * x - sigma * output if v else (x - sigma * output) / alpha
        first_order = settings["solver_order"] == 1 or i == settings["steps"] - 1
        now = Prediction(x, x0, None, a[i], None)
        x, past = dpmpp_step(now, a[i + 1], past=() if first_order else past), (now,)
        assert relative(x, DPMPP[f"{case}/x_steps"][i]) < 2e-5, i


@pytest.mark.parametrize(
    "case", ["linspace_eps_5", "linspace_eps_20", "linspace_v_10", "leading1_eps_20", "trailing_v_20"]
)
def test_dpmpp_runs_on_given_outputs(case):
    schedule = Schedule(ScheduleConfig(PREDICTIONS[DPMPP_CASES[case]["prediction_type"]]))
    outputs, steps = iter(DPMPP[f"{case}/model_outputs"]), []
    timesteps = DPMPP[f"{case}/timesteps"].tolist()
    sample_loop(
        "dpm++",
        lambda x, t, timestep: next(outputs),
        DPMPP["x_T"],
        timesteps,
        schedule,
        on_step=lambda i, x, x0: steps.append(x),
    )
    for i, want in enumerate(DPMPP[f"{case}/x_steps"]):
        assert relative(steps[i], want) < 2e-5, i


@pytest.mark.parametrize("spacing", ["leading_1000", "leading_50", "linspace_20", "trailing_50"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_steps_on_given_outputs(prediction, spacing):
    g, case = load_file(FIXTURES / "ddpm.safetensors"), f"{prediction}_{spacing}"
    schedule, timesteps = Schedule(ScheduleConfig(PREDICTIONS[prediction])), g[f"{case}/timesteps"].tolist()
    a = [*schedule.alphas_cumprod[timesteps].tolist(), 1.0]
    for j, i in enumerate(g[f"{case}/selected"].tolist()):
        x0 = schedule.to_x0(g["x"], torch.tensor([timesteps[i]]), g["model_output"])
        assert relative(x0, g[f"{case}/pred_x0"][j : j + 1]) < 2e-5
        x = ddpm_step(Prediction(g["x"], x0, None, a[i], None), a[i + 1], noise=lambda x: g["noise"])
        assert relative(x, g[f"{case}/prev_sample"][j : j + 1]) < 2e-5


# ---------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30, 1000])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_ddim_finds_what_the_denoiser_knows(prediction, steps):
    schedule = Schedule(ScheduleConfig(prediction))
    x0, x = randn(2, 4, 4, 4, seed=1), randn(2, 4, 4, 4)
    predicted = []
    y = sample("ddim", knows(x0, schedule), x, schedule, steps, on_step=lambda i, x, x0: predicted.append(x0))
    torch.testing.assert_close(predicted[-1], x0, atol=1e-5, rtol=1e-4)
    # The end is timestep 0, not the data: x0 keeps the noise that leads back to the start.
    t = torch.full((2,), ddim_timesteps(schedule, steps)[0])
    eps = schedule.to_eps(x, t, knows(x0, schedule)(x, t, 0))
    torch.testing.assert_close(y, schedule.q_sample(x0, torch.zeros_like(t), eps), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_reaches_the_data_itself(name, steps, prediction):
    schedule = Schedule(ScheduleConfig(prediction, zero_terminal_snr=True))
    x0 = randn(2, 4, 4, 4, seed=1)
    y = sample(name, knows(x0, schedule), randn(2, 4, 4, 4), schedule, steps, noise=noise_source())
    torch.testing.assert_close(y, x0, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_zero_terminal_snr_with_random_ddim(eta):
    x0, source, draws = randn(2, 4, 4, 4, seed=1), noise_source(), []

    def noise(x):
        draws.append(source(x))
        return draws[-1]

    y = sample("ddim", knows(x0, ZERO_SNR), randn(2, 4, 4, 4), ZERO_SNR, 7, eta=eta, noise=noise)
    torch.testing.assert_close(y, x0, atol=1e-5, rtol=1e-4)
    assert len(draws) == 6  # none for the last step, which adds no noise


def uniform_error(step, steps):
    """The error of `steps` steps at equal distances in log-SNR, against the exact solution for Gaussian data."""
    half_log_snr = torch.linspace(-2.5, 1.5, steps + 1, dtype=torch.float64)
    a = torch.sigmoid(2 * half_log_snr).tolist()
    x = start = randn(1, 1, 1, 64, dtype=torch.float64)
    past = ()

    def predict(x, a):
        x0 = gaussian_x0(x, a)
        return Prediction(x, x0, (x - a**0.5 * x0) / (1 - a) ** 0.5, a, None)

    for a_now, a_next in pairwise(a):
        now = predict(x, a_now)
        x, past = step(now, a_next, past=past, predict=predict), (now, *past)[:2]
    return (x - gaussian_flow(start, a[0], a[-1])).norm().item()


def test_orders_of_convergence():
    """Twice the steps: half the error for DDIM, a quarter for DPM-Solver++(2M) and Heun, an eighth for UniPC, whose
    corrector is an order more."""

    def first_order(now, a_next, **_):
        return dpmpp_step(now, a_next)

    assert uniform_error(ddim_step, 640) / uniform_error(ddim_step, 1280) == pytest.approx(2, abs=0.1)
    assert uniform_error(dpmpp_step, 640) / uniform_error(dpmpp_step, 1280) == pytest.approx(4, abs=0.2)
    assert uniform_error(heun_step, 160) / uniform_error(heun_step, 320) == pytest.approx(4, abs=0.2)
    assert uniform_error(unipc_step, 160) / uniform_error(unipc_step, 320) == pytest.approx(8, abs=0.8)
    # DPM-Solver++ of first order is DDIM.
    assert uniform_error(first_order, 10) == pytest.approx(uniform_error(ddim_step, 10), rel=1e-9)


@pytest.mark.parametrize("schedule", [PLAIN, ZERO_SNR], ids=["plain", "zero terminal SNR"])
@pytest.mark.parametrize("steps", [10, 20])
def test_second_order_pays_at_few_steps(schedule, steps):
    x, error = randn(1, 4, 8, 8, dtype=torch.float64), {}
    for name in ("ddim", "dpm++"):
        start = schedule.alphas_cumprod[timesteps_for(name, schedule, steps)[0]].item()
        end = schedule.alphas_cumprod[0].item() if name == "ddim" and schedule is PLAIN else 1.0
        y = sample(name, gaussian_denoiser(schedule), x, schedule, steps)
        error[name] = relative(y, gaussian_flow(x, start, end))
    assert error["dpm++"] < 0.65 * error["ddim"]


@pytest.mark.parametrize("schedule", [PLAIN, ZERO_SNR], ids=["plain", "zero terminal SNR"])
@pytest.mark.parametrize("name, steps", [("ddim", 1000), ("dpm++", 1000), ("heun", 300), ("unipc", 300)])
def test_deterministic_samplers_converge_to_the_exact_solution(name, steps, schedule):
    x = randn(1, 4, 8, 8, dtype=torch.float64)
    y = sample(name, gaussian_denoiser(schedule), x, schedule, steps)
    want = gaussian_flow(x, schedule.alphas_cumprod[-1].item(), 1.0)
    assert relative(y, want) < 3e-3


@pytest.mark.parametrize("schedule", [PLAIN, ZERO_SNR], ids=["plain", "zero terminal SNR"])
@pytest.mark.parametrize(
    "name, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", 0.0), ("dpm++", 0.0), ("dpm++-sde", 0.0)]
)
def test_all_samplers_draw_from_the_data(name, eta, schedule):
    # Start from the noised data: without zero terminal SNR that is not quite unit noise.
    data, noise = MEAN + DEVIATION * randn(1, 1, 120, 120, dtype=torch.float64), noise_source(2)
    x = schedule.q_sample(data, torch.tensor([999]), noise(data))
    steps = 60 if name == "dpm++-sde" else 300
    y = sample(name, gaussian_denoiser(schedule), x, schedule, steps, eta=eta, noise=noise_source())
    assert y.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert y.std().item() == pytest.approx(DEVIATION, abs=0.02)


def test_ddpm_is_ddim_with_eta_1():
    x, x0, z = randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=1), randn(1, 4, 8, 8, seed=2)
    for a, a_next in ((0.0, 0.3), (0.2, 0.3), (0.5, 0.98), (0.98, 1.0)):
        eps = (x - a**0.5 * x0) / (1 - a) ** 0.5
        now = Prediction(x, x0, eps, a, None)
        ddim = ddim_step(now, a_next, eta=1.0, noise=lambda x: z)
        torch.testing.assert_close(ddpm_step(now, a_next, noise=lambda x: z), ddim, atol=3e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- the interface


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_the_callables_see(name):
    """denoise gets what before_step returned, on_step the new x and the predicted x0, x itself stays as it is."""
    x, x0 = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    kept, seen, after, draws = x.clone(), [], [], []
    source = noise_source()

    def denoise(x, t, timestep):
        assert torch.equal(t, torch.tensor([timestep] * 3)) and timestep == pytest.approx(t[0].item())
        seen.append((timestep, bool((x == 7).all())))
        return knows(x0, PLAIN)(x, t, timestep)

    def before_step(x, t):
        assert t.shape == (3,)
        return torch.full_like(x, 7)

    def on_step(i, x, x0):
        after.append((i, x, x0))

    def noise(x):
        draws.append(x.shape)
        return source(x)

    eta = 0.5 if name == "ddim" else 0.0
    y = sample(name, denoise, x, PLAIN, 5, eta, noise, before_step, on_step)
    assert torch.equal(x, kept)
    assert [timestep for timestep, begins in seen if begins] == timesteps_for(name, PLAIN, 5)
    assert len(seen) == (9 if name.startswith(("heun", "dpm++-sde")) else 5)
    assert [i for i, _, _ in after] == [0, 1, 2, 3, 4]
    assert torch.equal(after[-1][1], y)
    torch.testing.assert_close(after[2][2], x0, atol=1e-4, rtol=1e-4)
    # DDIM goes to timestep 0 and draws at each step; DDPM goes to the data and does not at the last.
    assert len(draws) == DRAWS.get(name.removesuffix("-karras"), 0)
    assert not y.requires_grad


@pytest.mark.parametrize("name, eta", [("ddim", 1.0), *((name, 0.0) for name in SAMPLERS)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("schedule", [PLAIN, ZERO_SNR])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_what_is_not_finite_at_one_step_is_not_finite_at_the_end(name, eta, bad, schedule, at):
    """Even if the network, unlike a real one, makes numbers of it: nobody has to look at each step."""
    timesteps = timesteps_for(name, schedule, 5)

    def denoise(x, t, timestep):
        output = torch.zeros_like(x)
        output[0, 0, 0, 0] = bad if timestep == timesteps[at] else 0
        return output

    known = lambda x, t: 0 * x + schedule.q_sample(randn(1, 4, 8, 8), t, randn(1, 4, 8, 8))  # noqa: E731
    for keep in (None, known):  # inpainting: all is known
        y = sample(name, denoise, randn(1, 4, 8, 8), schedule, 5, eta, noise_source(), keep)
        assert not y[0, 0, 0, 0].isfinite() and y[0, 1:].isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_x_stays_in_fp32_around_a_half_precision_network(name):
    x, full = randn(1, 4, 8, 8), knows(randn(1, 4, 8, 8, seed=1), PLAIN)
    want = sample(name, full, x, PLAIN, 10, noise=noise_source())
    y = sample(name, lambda x, t, timestep: full(x, t, timestep).half(), x, PLAIN, 10, noise=noise_source())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_nothing_is_changed_in_place(prediction, name):
    """Neither x nor the network's outputs nor what on_step was given, where eps or x0 is the output itself too."""
    schedule, given = Schedule(ScheduleConfig(prediction)), []

    def give(x):
        given.append((x, x.clone()))
        return x

    outputs = [give(randn(1, 4, 8, 8, seed=i)) for i in range(9 if name.startswith(("heun", "dpm++-sde")) else 5)]
    source = iter(outputs)

    def on_step(i, x, x0):
        give(x), give(x0)

    denoise = lambda x, t, timestep: next(source)  # noqa: E731
    sample(name, denoise, give(randn(1, 4, 8, 8)), schedule, 5, 0.0, noise_source(), on_step=on_step)
    assert len(given) == len(outputs) + 1 + 2 * 5 and next(source, None) is None
    assert all(torch.equal(x, before) for x, before in given)


def test_errors_are_one_clear_sentence():
    x, denoise = randn(1, 4, 8, 8), lambda x, t, timestep: x
    with pytest.raises(ValueError, match='the sampler is "plms", expected one of ddim, ddpm, dpm\\+\\+'):
        sample("plms", denoise, x, PLAIN, 10)
    for name in SAMPLERS:
        for steps in (0, -1, 1001):
            with pytest.raises(ValueError, match=f"the number of steps is {steps}, expected 1..1000"):
                sample(name, denoise, x, PLAIN, steps, noise=noise_source())
    with pytest.raises(ValueError, match='sampler "ddim" with eta 0.5 draws noise: pass the argument noise'):
        sample_loop("ddim", denoise, x, [1], PLAIN, eta=0.5)
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"eta is {eta}, expected 0"):
            sample("ddim", denoise, x, PLAIN, 10, eta=eta, noise=noise_source())
    with pytest.raises(ValueError, match='sampler "ddpm" with eta 0.0 draws noise: pass the argument noise'):
        sample_loop("ddpm", denoise, x, [1], PLAIN)
    with pytest.raises(ValueError, match="the number of steps is 51 of 1000, expected 1..50 of at least 50 for lcm"):
        sample("lcm", denoise, x, PLAIN, 51, noise=noise_source())
    with pytest.raises(ValueError, match="the number of steps is 4 of 40"):
        lcm_timesteps(Schedule(ScheduleConfig(timesteps=40)), 4)
    for name in ("ddpm", "dpm++", "euler-a"):
        with pytest.raises(ValueError, match='eta is 1.0, but sampler .* has no eta: leave it at 0 or use "ddim"'):
            sample(name, denoise, x, PLAIN, 10, eta=1.0, noise=noise_source())
