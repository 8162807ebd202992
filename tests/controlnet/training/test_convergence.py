"""Whether control has set in and whether anything still changes, on curves as they come and as they might."""

import math

import numpy as np
import pytest

from controlnet.training.convergence import Convergence

# The measure of a real run on fill50k (batches of 8), every ten steps.
FILL50K = [0, 0, 0, 0, 0.00002, 0.00005, 0.0002, 0.0007, 0.002, 0.007, 0.032, 0.077, 0.156, 0.21, 0.25, 0.47]


def told(measures, losses=None, steps=10_000, every=10, seed=0):
    """-> [(step, first words)] of what is said along a run, with a loss that falls unless one is given."""
    convergence, said = Convergence(steps), []
    losses = losses or [0.9**i for i in range(len(measures))]
    for i, (loss, measure) in enumerate(zip(losses, measures, strict=True), start=1):
        if news := convergence.news(every * i, loss, measure):
            said.append((every * i, " ".join(news.split()[:6])))
    return said


def noise(count, size):
    return (size * np.random.default_rng(0).standard_normal(count)).tolist()


def sets_in(step, said):
    return (said, f"control sets in at step {step}:")


def test_control_sets_in_where_the_measure_of_a_real_run_leaves_zero():
    assert told(FILL50K) == [sets_in(110, 120)]


@pytest.mark.parametrize(
    "measures, said",
    [
        (noise(200, 0.003), []),  # zero, with far more noise than there is
        ([0, 0, 0.5, 0, 0, 0, -0.3, 0], []),  # a step that went astray
        ([-0.02] * 8, []),  # another's hint is better
        ([0, math.nan, math.nan, 0.1, math.nan, 0.1, 0.1], [sets_in(60, 70)]),
        ([0.0004 * i for i in range(30)], [sets_in(260, 270)]),  # slowly
        ([0, 0, 0.02, 0.02, 0, 0, 0.02, 0.02], [sets_in(30, 40)]),  # once
    ],
)
def test_control_sets_in_at_the_first_of_two_validations_above_one_percent(measures, said):
    assert told(measures) == said


def test_a_run_without_control_is_told_so_once_at_its_half():
    assert told([0.0] * 40, steps=400) == [(200, "control has not set in by")]
    assert told([0.0] * 8, steps=80) == []  # too few validations to say anything
    assert told([0.0] * 25 + [0.1] * 5, steps=400) == [(200, "control has not set in by"), sets_in(260, 270)]


def test_a_flat_curve_is_told_once_it_is_as_long_as_what_was_before_it():
    rising = [0.0] * 5 + [0.1 * i for i in range(1, 16)]
    losses = [1 - 0.02 * i for i in range(20)]
    flat = [1.5 + n for n in noise(80, 0.02)]
    noisy = [losses[-1] + n for n in noise(80, 0.002)]
    said = told(rising + flat, losses + noisy)
    assert said == [sets_in(60, 70), (400, "validation loss and control measure have")]
    still_better = [losses[-1] * 0.998**i for i in range(80)]
    assert told(rising + flat, losses + still_better) == said[:1]
