"""From noise to a latent: DDIM, DDPM and DPM-Solver++(2M), each one function of a step under the same loop.

`denoise(x, t, timestep)` gives the UNet's raw output for x (B, C, h, w) and t (B,), which is filled with the number
`timestep`; conditions and guidance are inside it. To read that number from t on a GPU would be to wait for it, and the
CPU waits nowhere in the loop: so the GPU always has the next work in its queue.
x keeps its dtype throughout: pass fp32 even where the network inside `denoise` computes in half precision. Nothing is
changed in place.

A list of timesteps runs from high to low noise. `a` is DDPM's alpha bar at the present one, a number, and `a_next` at
the next one of the list, which is less noisy (the papers' t - 1): x = sqrt(a) x0 + sqrt(1 - a) eps, and a = 1 is the
data itself. (schedule.py's alpha is the square root of that.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import Schedule

Denoise = Callable[[Tensor, Tensor, int], Tensor]
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
    skip: int = 0,
) -> Tensor:
    """x of unit noise (B, C, h, w) -> latents, with the sampler called `name` at the timesteps of `timesteps_for`.

    Image-to-image leaves the first `skip` of them out: x is then as noisy as the next one says.
    Raises ValueError for an unknown name, steps outside 1..T, missing noise, or an eta that the sampler cannot use.
    """
    timesteps = timesteps_for(name, schedule, steps)[skip:]
    return sample_loop(name, denoise, x, timesteps, schedule, eta, noise, before_step, on_step)


class Prediction(NamedTuple):
    """What the denoiser says of x at one timestep."""

    x: Tensor
    x0: Tensor
    eps: Tensor
    alpha_bar: float


def sample_loop(
    name: str,
    denoise: Denoise,
    x: Tensor,
    timesteps: list[int],
    schedule: Schedule,
    eta: float = 0.0,
    noise: Noise | None = None,
    before_step: BeforeStep | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """`sample` at any timesteps, strictly falling whole numbers in [0, T)."""
    check_eta(name, eta)
    if noise is None and (name == "ddpm" or eta > 0):
        raise ValueError(f'sampler "{name}" with eta {eta} draws noise: pass the argument noise')
    step, before = SAMPLERS[name], None
    # The released DDIM ends at the noise level of timestep 0. All others, and zero terminal SNR, end at the data.
    ends_at_data = name != "ddim" or schedule.config.zero_terminal_snr
    end = 1.0 if ends_at_data else schedule.alphas_cumprod[0].item()
    alpha_bars = [*schedule.alphas_cumprod[timesteps].tolist(), end]
    schedule = schedule.to(x.device)
    for i, timestep in enumerate(timesteps):
        t = torch.full((len(x),), timestep, device=x.device)
        x = before_step(x, t) if before_step else x
        output = denoise(x, t, timestep)
        now = Prediction(x, schedule.to_x0(x, t, output), schedule.to_eps(x, t, output), alpha_bars[i])
        x, before = step(now, before, alpha_bars[i + 1], eta, noise), now
        if on_step:
            on_step(i, x, now.x0)
    return x


# -------------------------------------------------------------------------------------------------------------- steps


def ddim_step(now: Prediction, before: Prediction | None, a_next: float, eta: float, noise: Noise | None) -> Tensor:
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


def ddpm_step(now: Prediction, before: Prediction | None, a_next: float, eta: float, noise: Noise) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, Alg. 2): a draw from q(x_next | x, x0), Eq. 6 and 7.

    With the smaller fixed variance, beta as large as the step from `a_next` to `a` makes it, and without clipping x0.
    The last step adds no noise.
    """
    a, beta = now.alpha_bar, 1 - now.alpha_bar / a_next
    mean = a_next**0.5 * beta / (1 - a) * now.x0 + (1 - beta) ** 0.5 * (1 - a_next) / (1 - a) * now.x
    variance = (1 - a_next) / (1 - a) * beta
    return mean + variance**0.5 * noise(mean) if variance > 0 else mean


def dpmpp_step(now: Prediction, before: Prediction | None, a_next: float, eta: float, noise: Noise | None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Alg. 2): deterministic, second order, one evaluation a step.

    The first and the last step are of first order. The paper's alpha_next (e^-h - 1) is written as
    alpha sigma_next / sigma - alpha_next, which is the same and also finite where log-SNR is not: at pure noise
    (a = 0) and at the data (a_next = 1).
    """
    a = now.alpha_bar
    alpha, sigma = a**0.5, (1 - a) ** 0.5
    alpha_next, sigma_next = a_next**0.5, (1 - a_next) ** 0.5
    D = now.x0
    if before is not None and a_next < 1:
        h_before, h = half_log_snr(a) - half_log_snr(before.alpha_bar), half_log_snr(a_next) - half_log_snr(a)
        D = now.x0 + h / (2 * h_before) * (now.x0 - before.x0)  # 1 / (2 r) of the paper; 0 after pure noise
    return sigma_next / sigma * now.x - (alpha * sigma_next / sigma - alpha_next) * D


def half_log_snr(alpha_bar: float) -> float:
    """The paper's lambda: log(alpha / sigma)."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar)) if alpha_bar > 0 else -math.inf


SAMPLERS = {"ddim": ddim_step, "ddpm": ddpm_step, "dpm++": dpmpp_step}


def check_eta(name: str, eta: float) -> None:
    """Raises ValueError for an eta that the sampler called `name` cannot use."""
    if name != "ddim" and eta != 0:
        raise ValueError(f'eta is {eta}, but sampler "{name}" has no eta: leave it at 0 or use "ddim"')
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 (deterministic) to 1 (as random as DDPM)")


# ---------------------------------------------------------------------------------------------------------- timesteps


def timesteps_for(name: str, schedule: Schedule, steps: int) -> list[int]:
    """The timesteps of each sampler.

    Zero terminal SNR: trailing for all, as it must start at T - 1. Otherwise DDIM has its own and DDPM and
    DPM-Solver++ the even ones. Raises ValueError for an unknown name or steps outside 1..T.
    """
    if name not in SAMPLERS:
        raise ValueError(f'the sampler is "{name}", expected one of {", ".join(SAMPLERS)}')
    return ddim_timesteps(schedule, steps) if name == "ddim" else even_timesteps(schedule, steps)


def ddim_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """DDIM's "uniform" timesteps of the released code: 1, 1 + T // steps, 1 + 2 (T // steps) ..., here falling.

    There may be more of them than `steps`: 30 gives 31. For some `steps` (3, 9, 27, 36, 101, more than 500 ...) the
    last one would be T, where the released code fails: these get exactly `steps` evenly spaced ones. Trailing for zero
    terminal SNR.
    Raises ValueError for steps outside 1..T.
    """
    T = _check_steps(schedule, steps)
    if schedule.config.zero_terminal_snr:
        return trailing_timesteps(T, steps)
    released = range(1, T + 1, T // steps)
    if released[-1] < T:
        return list(reversed(released))
    first = 1 if steps < T else 0  # all of 0 .. T - 1 for T steps
    return [first + i * (T - first) // steps for i in reversed(range(steps))]


def even_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """Exactly `steps` timesteps from T - 1 down, 0 excluded: the last step goes to the data (Lu et al.'s "time
    uniform" steps, arXiv 2211.01095). All of T - 1 ... 0 for T steps; trailing for zero terminal SNR.

    Raises ValueError for steps outside 1..T.
    """
    T = _check_steps(schedule, steps)
    if schedule.config.zero_terminal_snr or steps == T:
        return trailing_timesteps(T, steps)
    return [round((T - 1) * i / steps) for i in range(steps, 0, -1)]


def trailing_timesteps(T: int, steps: int) -> list[int]:
    """Exactly `steps` timesteps from T - 1 down, T / steps apart (Lin et al., arXiv 2305.08891, section 3.3)."""
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def _check_steps(schedule: Schedule, steps: int) -> int:
    T = schedule.config.timesteps
    if not 1 <= steps <= T:
        raise ValueError(f"the number of steps is {steps}, expected 1..{T}")
    return T
