"""Learning-rate schedules."""

import math

import pytest
import torch

from controlnet.training.lr_schedules import constant_schedule, lr_schedule_of
from controlnet.training.optimisation import Optimisation
from controlnet.training.options import TrainSettings

# Factors to the learning rate at some of 100 steps, by hand; restarts are at 25, 50 and 75.
FACTORS = {
    "constant": {0: 0.25, 2: 0.75, 4: 1, 50: 1, 100: 1, 130: 1},
    "linear": {0: 0.25, 2: 0.75, 4: 0.96, 50: 0.5, 99: 0.01, 100: 0, 130: 0},
    "cosine": {0: 0.25, 2: 0.75, 50: 0.5, 75: 0.5 - math.sqrt(0.125), 100: 0, 130: 0},
    "cosine_with_restarts": {
        2: 0.75,
        24: 0.5 * (1 + math.cos(math.pi * 0.96)),
        25: 1,
        50: 1,
        75: 1,
        80: 0.5 * (1 + math.cos(0.2 * math.pi)),
        100: 0,
        130: 0,
    },
    "polynomial": {0: 0.25, 2: 0.75, 50: 0.125, 90: 0.001, 100: 0, 130: 0},
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_schedule_is_the_published_one(name):
    settings = TrainSettings(lr_schedule=name, warmup=4, steps=100, lr_cycles=4, lr_power=3.0)
    factor = lr_schedule_of(settings)
    assert {step: factor(step) for step in FACTORS[name]} == pytest.approx(FACTORS[name], abs=1e-12)


def test_without_a_warm_up_the_first_step_is_a_whole_one():
    assert [constant_schedule(0)(step) for step in range(2)] == [1, 1]


@pytest.mark.parametrize("name", FACTORS)
def test_a_resumed_run_has_the_rates_of_one_that_asked_for_as_many_steps(name):
    """More steps than it began with: the state brings the position, not the rates."""

    def optimisation(steps):
        settings = TrainSettings(
            lr=0.1, lr_schedule=name, warmup=2, steps=steps, clip=1.0, optimizer="adamw", precision="fp32"
        )
        torch.manual_seed(0)
        named = list(torch.nn.Linear(2, 2).named_parameters())
        return Optimisation.from_settings(named, settings, torch.device("cpu"))

    def rates(one, steps):
        used = []
        for _ in range(steps):
            used.append(one.optimizer.param_groups[0]["lr"])
            for parameter in one.parameters:
                parameter.grad = torch.ones_like(parameter)
            one.finish(one.update())
        return used

    first, resumed, whole = optimisation(4), optimisation(9), optimisation(9)
    rates(first, 4)
    resumed.load_state_dict(first.state_dict())
    assert rates(resumed, 5) == rates(whole, 9)[4:]
