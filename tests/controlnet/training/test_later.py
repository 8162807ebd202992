"""A step that never waits for the GPU: what it does is counted, on tensors of CUDA that hold nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from fakes import needs_fake_cuda
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlnet.objective import Drawn, EncodedPairs, loss_inputs
from controlnet.training import later
from controlnet.training.later import Later
from controlnet.training.lr_schedules import constant_schedule
from controlnet.training.optimisation import Optimisation


class Waits(TorchDispatchMode):
    """The operations for which the CPU waits: numbers that are read, and copies that block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, output = func.name(), func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, output)) if isinstance(leaf, torch.Tensor)}
        blocking = "copy" in name and devices == {"cpu", "cuda"} and not (kwargs or {}).get("non_blocking", False)
        if name in ("aten::_local_scalar_dense", "aten::nonzero") or blocking:
            self.seen.append(name)
        return output


@pytest.fixture
def events(monkeypatch):
    """In the place of CUDA's own, which need a GPU."""
    order = []
    event = SimpleNamespace(record=lambda stream: order.append("recorded"), synchronize=lambda: order.append("awaited"))
    monkeypatch.setattr(later.torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(later.torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(later.torch.cuda, "is_current_stream_capturing", lambda: False)
    return order


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_nothing(events, precision):
    """GradScaler makes none of its tensors without a GPU, so fp16 is not among these."""
    with FakeTensorMode(), Waits() as waits:
        parameters = [nn.Parameter(torch.empty(3, 4, device="cuda")) for _ in range(2)]
        named = [(f"layer{i}", parameter) for i, parameter in enumerate(parameters)]
        optimisation = Optimisation(named, 1e-3, constant_schedule(0), torch.device("cuda"), precision)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        norm = optimisation.finish(optimisation.update())
        numbers = Later(norm, norm)
        assert waits.seen == [] and events == ["recorded"] * 2 and numbers.numbers.device.type == "cpu"
        with pytest.raises(Exception, match="_local_scalar_dense"):
            norm.item()  # is one that would be seen
        assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("capturing", [True, False])
def test_adamw_is_told_whether_it_is_recorded(events, monkeypatch, capturing):
    """It refuses to be, untold, and warns of what it was told without need."""
    monkeypatch.setattr(later.torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(3, 4, device="cuda"))
        optimisation = Optimisation([("a", parameter)], 1e-3, constant_schedule(0), torch.device("cuda"))
        parameter.grad = torch.empty_like(parameter)
        optimisation.update()
    assert optimisation.optimizer.param_groups[0]["capturable"] is capturing


@needs_fake_cuda
def test_what_goes_to_the_gpu_is_pinned_and_not_waited_for(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    with FakeTensorMode(), Waits() as waits:
        latents, t = torch.empty(2, 4, 8, 8), torch.empty(2, dtype=torch.int64)
        encoded = EncodedPairs(latents, latents, torch.empty(2, 77, 16, device="cuda"))  # encoded there, in this step
        drawn = Drawn(t, latents, latents, torch.empty(2, dtype=torch.bool))
        empty_prompt = torch.empty(1, 77, 16, device="cuda")
        inputs = loss_inputs(encoded, torch.empty(2, 3, 64, 64), drawn, 1.0, empty_prompt, torch.device("cuda"))
    assert {tensor.device.type for tensor in inputs} == {"cuda"}
    assert waits.seen == [] and len(pinned) == 7


def test_numbers_are_those_that_were_there(events):
    number = torch.tensor(0.1)
    numbers = Later(number, torch.tensor(math.inf))
    number += 1
    assert numbers.read() == [torch.tensor(0.1).item(), math.inf] and events == []
