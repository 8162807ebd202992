"""The step of a training run: recorded, it trains what it trains computed, and it still tells what is wrong."""

import math

import pytest
import torch
from tape import record_on_tapes
from torch import nn

from controlnet.common.graphs import recorded
from controlnet.training import step as step_module
from controlnet.training.distributed import Process
from controlnet.training.lr_schedules import constant_schedule
from controlnet.training.optimisation import Optimisation
from controlnet.training.step import Step

ALONE = Process(0, 1, torch.device("cpu"))


class SquaredError(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))

    def forward(self, x, y):
        return (self.layers(x) - y).square().mean()


def batches(count, factor=1.0):
    generator = torch.Generator().manual_seed(1)
    return [
        (factor * torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(count)
    ]


def training(optimizer="adamw", precision="fp32", **options):
    """A step whose learning rate rises for four, and what it trains."""
    loss = SquaredError()
    schedule = constant_schedule(4)
    optimisation = Optimisation(
        loss.named_parameters(), 0.05, schedule, ALONE.device, precision, clip=1.0, optimizer=optimizer
    )
    return Step(loss, optimisation, ALONE, **options), loss, optimisation


def trained(inputs, **options):
    """-> losses and norms of each step, and the weights at the end."""
    step, loss, optimisation = training(**options)
    coming, numbers = iter(inputs), []
    while len(numbers) * step.accumulate < len(inputs):
        numbers.append(torch.stack(step(lambda: next(coming))))
    return [*numbers, *(parameter.detach() for parameter in loss.parameters())]


@pytest.fixture
def tapes(monkeypatch):
    """CUDA graphs, on the CPU."""
    monkeypatch.setattr(step_module, "recorded", lambda compute, _: recorded(compute, torch.device("cuda")))
    return record_on_tapes(monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_recorded_steps_train_what_computed_ones_do(tapes, optimizer, precision):
    """One of them is not finite, so in fp16 the scale of the loss changes as well."""
    inputs, settings = batches(6), dict(optimizer=optimizer, precision=precision)
    inputs[3][0][0] = math.inf
    computed = trained(inputs, record=False, **settings)
    assert not tapes
    replayed = trained(inputs, **settings)
    assert [tape.replays for tape in tapes] == [5]
    for one, other in zip(computed, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_two_steps_of_one_optimizer_are_replayed_with_its_learning_rate(tapes):
    """Which rises from call to call."""
    inputs, weights = batches(4), []
    for record in (False, True):
        first, loss, optimisation = training(record=record)
        first(lambda: inputs[0])
        second = Step(loss, optimisation, ALONE, record=record)
        for step, batch in ((second, inputs[1]), (first, inputs[2]), (second, inputs[3])):
            step(lambda batch=batch: batch)
        weights.append(list(loss.parameters()))
    assert [tape.replays for tape in tapes] == [1, 1] and all(map(torch.equal, *weights))


def test_accumulated_batches_are_one_step_and_are_not_recorded(tapes):
    inputs = batches(6)
    together = [tuple(torch.cat(pair) for pair in zip(*inputs[i : i + 2], strict=True)) for i in (0, 2, 4)]
    for one, other in zip(trained(inputs, accumulate=2), trained(together, record=False), strict=True):
        torch.testing.assert_close(one, other)
    assert not tapes


def test_a_recorded_run_that_is_lost_names_the_layer(tapes):
    step, loss, optimisation = training()
    loss.layers[0].weight.register_hook(lambda gradient: gradient * math.inf)
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    coming = iter(batches(30))
    with pytest.raises(FloatingPointError, match="20 steps in a row .*layers.0.weight"):
        for _ in range(30):
            step(lambda: next(coming))
    assert tapes[0].replays == 20 and all(map(torch.equal, loss.parameters(), before))


def test_a_recorded_run_that_recovers_is_replayed_again(tapes):
    step, loss, optimisation = training()
    coming = iter(batches(21, factor=math.nan) + batches(5))
    for _ in range(26):
        step(lambda: next(coming))
    assert optimisation.skipped_in_a_row == 0 and tapes[0].replays == 20 + 3  # two were looked at
    assert all(parameter.isfinite().all() for parameter in loss.parameters())
