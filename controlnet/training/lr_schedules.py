"""Learning-rate schedules by their usual names. Each is a function of the step alone, so a resumed run has the rates of
one that was never stopped.

They are diffusers' (optimization.py), except that the warm-up begins above 0 and does not put the decay off (the lower
of the two counts), and that polynomial ends at 0, not at a rate of 1e-7.
"""

import math
from collections.abc import Callable

from .options import TrainSettings

# The step -> a factor of the learning rate.
LRSchedule = Callable[[int], float]


def lr_schedule_of(settings: TrainSettings) -> LRSchedule:
    warmup, steps = settings.warmup, settings.steps
    return {
        "constant": constant_schedule(warmup),
        "linear": polynomial_schedule(warmup, steps, power=1),
        "cosine": cosine_schedule(warmup, steps),
        "cosine_with_restarts": cosine_schedule(warmup, steps, settings.lr_cycles),
        "polynomial": polynomial_schedule(warmup, steps, settings.lr_power),
    }[settings.lr_schedule]


def constant_schedule(warmup: int) -> LRSchedule:
    """Linear warm-up over the first steps, then 1."""
    return lambda step: min((step + 1) / max(warmup, 1), 1.0)


def polynomial_schedule(warmup: int, steps: int, power: float) -> LRSchedule:
    """Linear warm-up, then a power of what is left of `steps`: from 1 down to 0."""
    warming = constant_schedule(warmup)
    return lambda step: min(warming(step), (1 - min(step / steps, 1)) ** power)


def cosine_schedule(warmup: int, steps: int, cycles: int = 1) -> LRSchedule:
    """Linear warm-up, then half a cosine from 1 down to 0 at `steps`, or several of them one after the other."""
    warming = constant_schedule(warmup)

    def factor(step: int) -> float:
        share = cycles * step % steps / steps if step < steps else 1
        return min(warming(step), 0.5 * (1 + math.cos(math.pi * share)))

    return factor
