"""Which timesteps a sampler visits. All lists fall from high to low noise.

Whole numbers are those that the UNet was trained at. A sampler that needs noise levels in between gets fractional
timesteps, floats throughout (schedule.py says what they mean); how it ends after the last is the sampler's matter.
Those that take a schedule raise ValueError for steps outside 1..T.
"""

import numpy as np

from .schedule import Schedule

KARRAS_HIGHEST = 80  # noise level
LCM_TRAINED = 50  # of the T timesteps, those at which a consistency model was distilled


def ddim_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """DDIM's "uniform" timesteps of the released code: 1, 1 + T // steps, 1 + 2 (T // steps) ..., here falling.

    There may be more of them than `steps`: 30 gives 31. Where T // steps divides T - 1 (for T = 1000: 3, 9, 27, 36, 37,
    101-111, 251-333 and all above 500) the last one would be T, and the released code fails: these get exactly `steps`
    evenly spaced ones. Trailing for zero terminal SNR.
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
    uniform" steps, arXiv 2211.01095). All of T - 1 ... 0 for T steps; trailing for zero terminal SNR."""
    T = _check_steps(schedule, steps)
    if schedule.config.zero_terminal_snr or steps == T:
        return trailing_timesteps(T, steps)
    return [round((T - 1) * i / steps) for i in range(steps, 0, -1)]


def uniform_timesteps(schedule: Schedule, steps: int) -> list[float]:
    """Exactly `steps` fractional timesteps from T - 1 down to 0, evenly spaced: k-diffusion's, A1111's schedule type
    "Uniform". Trailing for zero terminal SNR."""
    T = _check_steps(schedule, steps)
    if schedule.config.zero_terminal_snr:
        return [float(t) for t in trailing_timesteps(T, steps)]
    return np.linspace(T - 1, 0, steps).round(6).tolist()


def karras_timesteps(schedule: Schedule, steps: int) -> list[float]:
    """Exactly `steps` fractional timesteps, from T - 1 to 0, evenly spaced in the seventh root of their noise levels
    sigma / alpha (Karras et al., arXiv 2206.00364, Eq. 5).

    With zero terminal SNR the first level, which is infinite, stands where the paper's highest does.
    """
    T, rho = _check_steps(schedule, steps), 7
    highest, lowest = min(schedule.noise_ratios[-1], KARRAS_HIGHEST), schedule.noise_ratios[0]
    levels = np.linspace(highest ** (1 / rho), lowest ** (1 / rho), steps)[1:] ** rho
    return [float(T - 1), *(schedule.timestep_at(1 / (1 + level**2)) for level in levels.tolist())]


def lcm_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """Those of the 50 at which consistency models are distilled (Luo et al., arXiv 2310.04378) that lie evenly from
    T - 1 down, as in the released code."""
    T = _check_steps(schedule, steps)
    if not steps <= LCM_TRAINED <= T:
        raise ValueError(
            f"the number of steps is {steps} of {T}, expected 1..{LCM_TRAINED} of at least {LCM_TRAINED} for lcm: 4 to "
            "8 are enough"
        )
    apart = T // LCM_TRAINED
    return [(LCM_TRAINED - i * LCM_TRAINED // steps) * apart - 1 for i in range(steps)]


def trailing_timesteps(T: int, steps: int) -> list[int]:
    """Exactly `steps` timesteps from T - 1 down, T / steps apart (Lin et al., arXiv 2305.08891, section 3.3)."""
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def _check_steps(schedule: Schedule, steps: int) -> int:
    T = schedule.config.timesteps
    if not 1 <= steps <= T:
        raise ValueError(f"the number of steps is {steps}, expected 1..{T}")
    return T
