"""From noise to a latent: each sampler is one function of a step, under the same loop, with its timesteps (`SAMPLERS`).

`denoise(x, t, timestep)` gives the UNet's raw output for x (B, C, h, w) and t (B,), which is filled with the number
`timestep`; conditions and guidance are inside it. Reading that number from t would make the CPU wait for the GPU.
Nothing in the loop does, so the GPU's queue never runs empty.
x keeps its dtype throughout: pass fp32 even where the network inside `denoise` computes in half precision. Nothing is
changed in place.

A list of timesteps runs from high to low noise. `a` is DDPM's alpha bar at the present one, a number, and `a_next` at
the next one of the list, which is less noisy (the papers' t - 1): x = sqrt(a) x0 + sqrt(1 - a) eps, and a = 1 is the
data itself, a = 0 pure noise. (schedule.py's alpha is the square root of that.) Papers and programs that write
x = x0 + sigma eps mean our x / sqrt(a), and by sigma our sqrt(1 / a - 1).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedule import Schedule
from .timesteps import ddim_timesteps, even_timesteps, karras_timesteps, lcm_timesteps, uniform_timesteps

Denoise = Callable[[Tensor, Tensor, float], Tensor]
Noise = Callable[[Tensor], Tensor]  # noise(x) -> fresh unit noise like x, for stochastic samplers
BeforeStep = Callable[[Tensor, Tensor], Tensor]  # before_step(x, t) -> x: inpainting puts the known part back in
OnStep = Callable[[int, Tensor, Tensor], None]  # on_step(i, x, x0), after step i: the new x, the x0 just predicted


@torch.no_grad()
def sample(
    name: str,
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    noise: Noise | None = None,
    before_step: BeforeStep | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """x of unit noise (B, C, h, w) -> latents, with the sampler called `name` at the timesteps of `timesteps_for`.

    Raises ValueError for an unknown name, steps outside 1..T, missing noise, or an eta that the sampler cannot use.
    """
    timesteps = timesteps_for(name, schedule, steps)
    return sample_loop(name, denoise, x, timesteps, schedule, eta, noise, before_step, on_step)


class Prediction(NamedTuple):
    """What the denoiser says of x at one timestep."""

    x: Tensor
    x0: Tensor
    eps: Tensor
    alpha_bar: float
    timestep: float


def sample_loop(
    name: str,
    denoise: Denoise,
    x: Tensor,
    timesteps: list[float],
    schedule: Schedule,
    eta: float = 0.0,
    noise: Noise | None = None,
    before_step: BeforeStep | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """`sample` at any timesteps, strictly falling numbers in [0, T), all of them whole (int) or none (float).

    Image-to-image leaves the first ones out: x is then as noisy as the first that is left says.
    """
    check_eta(name, eta)
    sampler, past = SAMPLERS[name], ()
    if noise is None and (sampler.draws or eta > 0):
        raise ValueError(f'sampler "{name}" with eta {eta} draws noise: pass the argument noise')
    # The released DDIM ends at the noise level of timestep 0. All others, and zero terminal SNR, end at the data.
    ends_at_data = name != "ddim" or schedule.config.zero_terminal_snr
    alpha_bars = [*map(schedule.alpha_bar_at, timesteps), 1.0 if ends_at_data else schedule.alpha_bar_at(0)]
    schedule = schedule.to(x.device)

    def predict(x: Tensor, alpha_bar: float, timestep: float | None = None) -> Prediction:
        timestep = schedule.timestep_at(alpha_bar) if timestep is None else timestep
        t = torch.full((len(x),), timestep, device=x.device)
        output = denoise(x, t, timestep)
        return Prediction(x, schedule.to_x0(x, t, output), schedule.to_eps(x, t, output), alpha_bar, timestep)

    for i, timestep in enumerate(timesteps):
        if before_step:
            x = before_step(x, torch.full((len(x),), timestep, device=x.device))
        now = predict(x, alpha_bars[i], timestep)
        x = sampler.step(now, alpha_bars[i + 1], past=past, eta=eta, noise=noise, predict=predict)
        past = (now, *past)[:2]
        if on_step:
            on_step(i, x, now.x0)
    return x


# -------------------------------------------------------------------------------------------------------------- steps
# step(now, a_next, past, eta, noise, predict) -> x at a_next. Each names what it uses: `past` are the last two steps'
# predictions, newest first; predict(x, a) evaluates the denoiser once more, at any noise level.


def ddim_step(now: Prediction, a_next: float, *, eta: float = 0.0, noise: Noise | None = None, **_: Any) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502), Eq. 12: the predicted x0, the direction pointing to x_t, random noise.

    Deterministic for eta 0, as random as DDPM for eta 1.
    """
    sigma = ddim_sigma(now.alpha_bar, a_next, eta)
    # With eta 1 the difference can be 0, and a rounding error below it.
    x = a_next**0.5 * now.x0 + max(0.0, 1 - a_next - sigma**2) ** 0.5 * now.eps
    return x + sigma * noise(x) if sigma > 0 else x


def ddim_sigma(a: float, a_next: float, eta: float) -> float:
    """Eq. 16: the scale of the noise that a step adds."""
    return eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5


def ddpm_step(now: Prediction, a_next: float, *, noise: Noise, **_: Any) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, Alg. 2): a draw from q(x_next | x, x0), Eq. 6 and 7.

    With the smaller of DDPM's two variances, for the beta of the step from `a_next` to `a`; x0 is not clipped. The last
    step adds no noise. k-diffusion's "Euler ancestral" is the same, at other timesteps.
    """
    a, beta = now.alpha_bar, 1 - now.alpha_bar / a_next
    mean = a_next**0.5 * beta / (1 - a) * now.x0 + (1 - beta) ** 0.5 * (1 - a_next) / (1 - a) * now.x
    variance = (1 - a_next) / (1 - a) * beta
    return mean + variance**0.5 * noise(mean) if variance > 0 else mean


def euler_step(now: Prediction, a_next: float, **_: Any) -> Tensor:
    """Euler's method for d(x / sqrt(a)) / d sigma = eps (Karras et al., arXiv 2206.00364, Alg. 1, line 5): this is DDIM
    without noise (Song et al., Eq. 13), at other timesteps."""
    return ddim_step(now, a_next)


def heun_step(now: Prediction, a_next: float, *, predict: Callable[..., Prediction], **_: Any) -> Tensor:
    """Heun's method (Karras et al., Alg. 1, line 8): the mean of the derivatives where a step begins and where Euler's
    ends. Second order, two evaluations; from pure noise and to the data it is Euler's step."""
    x = euler_step(now, a_next)
    if now.alpha_bar == 0 or a_next == 1:
        return x
    eps = (now.eps + predict(x, a_next).eps) / 2
    return a_next**0.5 * (now.x / now.alpha_bar**0.5 + (noise_ratio(a_next) - noise_ratio(now.alpha_bar)) * eps)


def dpmpp_step(now: Prediction, a_next: float, *, past: tuple[Prediction, ...] = (), **_: Any) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Alg. 2): deterministic, second order, one evaluation a step.

    The first and the last step are of first order. The paper's alpha_next (e^-h - 1) is written as
    alpha sigma_next / sigma - alpha_next, which is the same and also finite where log-SNR is not: at pure noise
    (a = 0) and at the data (a_next = 1).
    """
    a = now.alpha_bar
    alpha, sigma = a**0.5, (1 - a) ** 0.5
    alpha_next, sigma_next = a_next**0.5, (1 - a_next) ** 0.5
    D = extrapolated_x0(now, past[0], a_next) if past and a_next < 1 else now.x0
    return sigma_next / sigma * now.x - (alpha * sigma_next / sigma - alpha_next) * D


def extrapolated_x0(now: Prediction, before: Prediction, a_next: float) -> Tensor:
    """The paper's D_i: x0 at the middle of the step, on the line through the last two."""
    h_before = half_log_snr(now.alpha_bar) - half_log_snr(before.alpha_bar)
    h = half_log_snr(a_next) - half_log_snr(now.alpha_bar)
    return now.x0 + h / (2 * h_before) * (now.x0 - before.x0)  # 1 / (2 r) of the paper; 0 after pure noise


def dpmpp_sde_step(
    now: Prediction, a_next: float, *, noise: Noise, predict: Callable[..., Prediction], **_: Any
) -> Tensor:
    """DPM++ SDE as k-diffusion has it, the stochastic DPM-Solver++(2S) (Lu et al., Alg. 1) with r = 1/2: an ancestral
    step to the middle in log-SNR, and the whole step with what is predicted there.

    Both steps follow one Brownian path over sigma: the noise of the whole is that of its two parts, added up. From pure
    noise and to the data it is an ancestral step.
    """
    if now.alpha_bar == 0 or a_next == 1:
        return ddpm_step(now, a_next, noise=noise)
    sigma, sigma_next = noise_ratio(now.alpha_bar), noise_ratio(a_next)
    sigma_middle = (sigma * sigma_next) ** 0.5
    a_middle, first, second = 1 / (1 + sigma_middle**2), noise(now.x), noise(now.x)
    middle = predict(ddpm_step(now, a_middle, noise=lambda x: first), a_middle)
    whole = (sigma - sigma_middle) ** 0.5 * first + (sigma_middle - sigma_next) ** 0.5 * second
    whole = whole / (sigma - sigma_next) ** 0.5
    return ddpm_step(now._replace(x0=middle.x0), a_next, noise=lambda x: whole)


def unipc_step(now: Prediction, a_next: float, *, past: tuple[Prediction, ...], **_: Any) -> Tensor:
    """UniPC (Zhao et al., arXiv 2302.04867), second order, with B(h) = e^h - 1: the predictor UniP-2 is
    DPM-Solver++(2M), and the corrector UniC-2 first does the step that led here again, with what is known by now. It
    takes no evaluation more.
    """
    return dpmpp_step(now._replace(x=unic(now, *past)) if past else now, a_next, past=past)


def unic(now: Prediction, before: Prediction, earlier: Prediction | None = None) -> Tensor:
    """The x that the corrector puts in the place of now.x, which the predictor made from `before`.

    The two differ in their estimate D of x0 alone. The corrector's weights solve the paper's two linear equations
    R a B(h) = phi(h), for a network that predicts the data.
    """
    a, a_before = now.alpha_bar, before.alpha_bar
    if earlier is None:  # of first order
        D, corrected = before.x0, (before.x0 + now.x0) / 2
    else:
        h = half_log_snr(a) - half_log_snr(a_before)
        r = (half_log_snr(earlier.alpha_bar) - half_log_snr(a_before)) / h
        B = math.expm1(-h)
        b1, b2 = -1 / h - 1 / B, 2 * ((1 - B / -h) / h - 0.5) / B
        weight = (b1 - b2) / (1 - r)
        D = extrapolated_x0(before, earlier, a)
        corrected = before.x0 + weight / r * (earlier.x0 - before.x0) + (b1 - weight) * (now.x0 - before.x0)
    factor = ((1 - a) / (1 - a_before) * a_before) ** 0.5 - a**0.5  # as in `dpmpp_step`
    return now.x - factor * (corrected - D)


def lcm_step(now: Prediction, a_next: float, *, noise: Noise, **_: Any) -> Tensor:
    """Multistep sampling of a latent consistency model (Luo et al., arXiv 2310.04378): the data, as the consistency
    function gives it, and fresh noise.

    The boundary's c_skip and c_out are the released code's, with sigma_data 0.5 and the timestep times 10: nearly 0 and
    1. For bases that were distilled so, or have an LCM LoRA, at guidance 1 to 2.
    """
    scaled = 10 * now.timestep / 0.5
    data = scaled / (scaled**2 + 1) ** 0.5 * now.x0 + 1 / (scaled**2 + 1) * now.x
    return a_next**0.5 * data + (1 - a_next) ** 0.5 * noise(data) if a_next < 1 else data


def half_log_snr(alpha_bar: float) -> float:
    """The paper's lambda: log(alpha / sigma)."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar)) if alpha_bar > 0 else -math.inf


def noise_ratio(alpha_bar: float) -> float:
    """Karras et al.'s sigma."""
    return (1 / alpha_bar - 1) ** 0.5


class Sampler(NamedTuple):
    step: Callable[..., Tensor]
    timesteps: Callable[[Schedule, int], list]
    draws: bool = False  # noise, in its steps; DDIM does so with an eta


SAMPLERS = {
    "ddim": Sampler(ddim_step, ddim_timesteps),
    "ddpm": Sampler(ddpm_step, even_timesteps, draws=True),
    "dpm++": Sampler(dpmpp_step, even_timesteps),
    "dpm++-sde": Sampler(dpmpp_sde_step, uniform_timesteps, draws=True),
    "euler": Sampler(euler_step, uniform_timesteps),
    "euler-a": Sampler(ddpm_step, uniform_timesteps, draws=True),
    "heun": Sampler(heun_step, uniform_timesteps),
    "unipc": Sampler(unipc_step, even_timesteps),
    "lcm": Sampler(lcm_step, lcm_timesteps, draws=True),
    "dpm++-karras": Sampler(dpmpp_step, karras_timesteps),
    "dpm++-sde-karras": Sampler(dpmpp_sde_step, karras_timesteps, draws=True),
    "euler-karras": Sampler(euler_step, karras_timesteps),
    "euler-a-karras": Sampler(ddpm_step, karras_timesteps, draws=True),
    "heun-karras": Sampler(heun_step, karras_timesteps),
    "unipc-karras": Sampler(unipc_step, karras_timesteps),
}


def timesteps_for(name: str, schedule: Schedule, steps: int) -> list[float]:
    """The timesteps of each sampler. With zero terminal SNR all start at T - 1.

    Raises ValueError for an unknown name, or a number of steps that it does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f'the sampler is "{name}", expected one of {", ".join(SAMPLERS)}')
    return SAMPLERS[name].timesteps(schedule, steps)


def check_eta(name: str, eta: float) -> None:
    """Raises ValueError for an eta that the sampler called `name` cannot use."""
    if name != "ddim" and eta != 0:
        raise ValueError(f'eta is {eta}, but sampler "{name}" has no eta: leave it at 0 or use "ddim"')
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 (deterministic) to 1 (as random as DDPM)")
