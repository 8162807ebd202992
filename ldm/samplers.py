"""From noise to a latent: DDIM, DDPM and DPM-Solver++(2M), each a short function over a denoiser.

`denoise(x, t)` gives the UNet's raw output for x (B, C, h, w) and t (B,); conditions and guidance are inside it.
x keeps its dtype throughout: pass fp32 even where the network inside `denoise` computes in half precision.

A timestep list runs from high to low noise. `a` is DDPM's alpha bar at the present timestep, a number, and `a_next`
at the next one of the list, which is less noisy (the papers' t - 1). x = sqrt(a) x0 + sqrt(1 - a) eps, and a = 1 is
the data itself. Every sampler takes, beside its own arguments,

    timesteps    whole numbers in [0, T), strictly falling
    noise        noise(x) -> fresh unit noise like x; a stochastic sampler needs it
    before_step  before_step(x, t) -> x, called before each step (inpainting puts the known part back in)
    on_step      on_step(i, x, x0), called after step i with the new x and the x0 that was just predicted

and changes none of them in place.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]
BeforeStep = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor], None]

SAMPLERS = ("ddim", "ddpm", "dpm++")


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
    check_eta(name, eta)
    if name == "ddim":
        return sample_ddim(denoise, x, timesteps, schedule, eta, noise, before_step, on_step)
    if name == "ddpm":
        return sample_ddpm(denoise, x, timesteps, schedule, noise, before_step, on_step)
    return sample_dpmpp(denoise, x, timesteps, schedule, before_step, on_step)


def check_eta(name: str, eta: float) -> None:
    """Raises ValueError for an eta that the sampler called `name` cannot use."""
    if name != "ddim" and eta != 0:
        raise ValueError(f'eta is {eta}, but sampler "{name}" has no eta: leave it at 0 or use "ddim"')
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 (deterministic) to 1 (as random as DDPM)")


# ---------------------------------------------------------------------------------------------------- timesteps


def timesteps_for(name: str, schedule: Schedule, steps: int) -> list[int]:
    """The timesteps of each sampler.

    Zero terminal SNR: trailing for all, as it must start at T - 1. Otherwise DDIM has its own and DDPM and
    DPM-Solver++ the even ones. Raises ValueError for an unknown name or steps outside 1..T.
    """
    if name not in SAMPLERS:
        raise ValueError(f'the sampler is "{name}", expected one of {", ".join(SAMPLERS)}')
    return ddim_timesteps(schedule, steps) if name == "ddim" else even_timesteps(schedule, steps)


def ddim_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """DDIM's "uniform" timesteps of the released code: one in every T // steps, from 1 upwards; here falling.

    Their number is then often not `steps` (30 gives 31). For the `steps` where the released code runs beyond T - 1 and
    fails (3, 9, 27, 36, 101, more than 500 ...), exactly `steps` evenly spaced ones. Trailing for zero terminal SNR.
    Raises ValueError for steps outside 1..T.
    """
    T = _check_steps(schedule, steps)
    if schedule.config.zero_terminal_snr:
        return trailing_timesteps(T, steps)
    released = range(1, T + 1, T // steps)
    if released[-1] < T:
        return list(reversed(released))
    first = 1 if steps < T else 0
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


# ---------------------------------------------------------------------------------------------------- DDIM


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    timesteps: list[int],
    schedule: Schedule,
    eta: float = 0.0,
    noise: Noise | None = None,
    before_step: BeforeStep | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502): deterministic for eta 0, as random as DDPM for eta 1.

    The last step goes to the noise level of timestep 0, as in the released code, not to the data. With zero terminal
    SNR it goes to the data. Raises ValueError for eta outside [0, 1], and if eta > 0 comes without `noise`.
    """
    check_eta("ddim", eta)
    if eta > 0 and noise is None:
        raise ValueError(f"DDIM with eta {eta} draws noise: pass the argument noise")
    end = 1.0 if schedule.config.zero_terminal_snr else schedule.alphas_cumprod[0].item()
    a = [*_levels(schedule, timesteps), end]
    for i, timestep in enumerate(timesteps):
        t = _batch(timestep, x)
        x = before_step(x, t) if before_step else x
        output = denoise(x, t)
        x0, eps = schedule.to_x0(x, t, output), schedule.to_eps(x, t, output)
        x = ddim_step(x0, eps, a[i], a[i + 1], eta, noise)
        if on_step:
            on_step(i, x, x0)
    return x


def ddim_step(x0: Tensor, eps: Tensor, a: float, a_next: float, eta: float, noise: Noise | None) -> Tensor:
    """Eq. 12: the predicted x0, the direction pointing to x_t, random noise. No noise is drawn where its scale is 0."""
    sigma = ddim_sigma(a, a_next, eta)
    # With eta 1 the difference can be 0, and a rounding error below it.
    x = a_next**0.5 * x0 + max(0.0, 1 - a_next - sigma**2) ** 0.5 * eps
    return x + sigma * noise(x) if sigma > 0 else x


def ddim_sigma(a: float, a_next: float, eta: float) -> float:
    """Eq. 16: the scale of the noise that a step adds."""
    return eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5


def invert_ddim(denoise: Denoise, x: Tensor, timesteps: list[int], schedule: Schedule) -> Tensor:
    """DDIM backwards: latents x (B, C, h, w) -> the noise at timesteps[0] that `sample_ddim` leads back near to x.

    The ODE of Song et al. in the other direction (section 4.3), as in the released code's `encode`: the noise at each
    new level is predicted from the x of the level before it.
    """
    a = schedule.alphas_cumprod[0].item()
    for timestep, a_next in zip(reversed(timesteps), reversed(_levels(schedule, timesteps)), strict=True):
        t = _batch(timestep, x)
        eps = schedule.to_eps(x, t, denoise(x, t))
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
        a = a_next
    return x


# ---------------------------------------------------------------------------------------------------- DDPM


def sample_ddpm(
    denoise: Denoise,
    x: Tensor,
    timesteps: list[int],
    schedule: Schedule,
    noise: Noise | None = None,
    before_step: BeforeStep | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, Alg. 2) on any timesteps, with the smaller fixed variance and
    without clipping x0. The last step goes to the data and adds no noise. Raises ValueError without `noise`."""
    if noise is None:
        raise ValueError("DDPM draws noise: pass the argument noise")
    a = [*_levels(schedule, timesteps), 1.0]  # the last step goes to the data
    for i, timestep in enumerate(timesteps):
        t = _batch(timestep, x)
        x = before_step(x, t) if before_step else x
        x0 = schedule.to_x0(x, t, denoise(x, t))
        x = ddpm_step(x, x0, a[i], a[i + 1], noise)
        if on_step:
            on_step(i, x, x0)
    return x


def ddpm_step(x: Tensor, x0: Tensor, a: float, a_next: float, noise: Noise) -> Tensor:
    """A draw from q(x_next | x, x0), Eq. 6 and 7, with beta as large as the step from `a_next` to `a` makes it."""
    beta = 1 - a / a_next
    mean = a_next**0.5 * beta / (1 - a) * x0 + (1 - beta) ** 0.5 * (1 - a_next) / (1 - a) * x
    variance = (1 - a_next) / (1 - a) * beta
    return mean + variance**0.5 * noise(x) if variance > 0 else mean


# ---------------------------------------------------------------------------------------------------- DPM-Solver++


def sample_dpmpp(
    denoise: Denoise,
    x: Tensor,
    timesteps: list[int],
    schedule: Schedule,
    before_step: BeforeStep | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Alg. 2): deterministic, second order, one evaluation a step.

    The first and the last step are of first order; the last one goes to the data.
    """
    a = [*_levels(schedule, timesteps), 1.0]  # the last step goes to the data
    x0_before = a_before = None
    for i, timestep in enumerate(timesteps):
        t = _batch(timestep, x)
        x = before_step(x, t) if before_step else x
        x0 = schedule.to_x0(x, t, denoise(x, t))
        x = dpmpp_step(x, x0, a[i], a[i + 1], x0_before, a_before)
        x0_before, a_before = x0, a[i]
        if on_step:
            on_step(i, x, x0)
    return x


def dpmpp_step(
    x: Tensor, x0: Tensor, a: float, a_next: float, x0_before: Tensor | None, a_before: float | None
) -> Tensor:
    """One step of Alg. 2: of second order with the x0 predicted one step before, at `a_before`; else of first order.

    The paper's alpha_next (e^-h - 1) is written as alpha sigma_next / sigma - alpha_next, which is the same and also
    finite where log-SNR is not: at pure noise (a = 0) and at the data (a_next = 1).
    """
    alpha, sigma = a**0.5, (1 - a) ** 0.5
    alpha_next, sigma_next = a_next**0.5, (1 - a_next) ** 0.5
    D = x0
    if x0_before is not None and a_next < 1:
        h_before, h = _lambda(a) - _lambda(a_before), _lambda(a_next) - _lambda(a)
        D = x0 + h / (2 * h_before) * (x0 - x0_before)  # 1 / (2 r) of the paper; 0 after pure noise
    return sigma_next / sigma * x - (alpha * sigma_next / sigma - alpha_next) * D


def _lambda(a: float) -> float:
    """Half the logarithm of the signal-to-noise ratio: log(alpha / sigma)."""
    return 0.5 * math.log(a / (1 - a)) if a > 0 else -math.inf


# ---------------------------------------------------------------------------------------------------- for all


def _levels(schedule: Schedule, timesteps: list[int]) -> list[float]:
    """Alpha bar at each timestep."""
    return schedule.alphas_cumprod[timesteps].tolist()


def _batch(timestep: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), timestep, device=x.device)
