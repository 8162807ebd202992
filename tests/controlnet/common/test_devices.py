"""Devices, what they compute fp32 in, which memory a program keeps, and what moves to a device and back."""

import platform
import sys

import forked
import pytest
import torch
from torch import nn

from controlnet.common.devices import (
    PRECISIONS,
    keep_freed_memory,
    lay_out,
    peak_memory,
    pick_device,
    temporarily_on,
    use_device,
    use_precision,
)
from controlnet.common.program import PRECISION_NAMES

# ------------------------------------------------------------------------------------------------- device and precision


@pytest.fixture
def gpus(monkeypatch):
    """Two, of the generation in the list that is returned; what becomes the current one is appended."""
    capability, current = [8, 0], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return capability, current


def test_nothing_is_left_to_be_allocated_on_the_first_gpu_if_another_is_picked(gpus):
    _, current = gpus
    assert use_device(None) == use_device("cuda") == torch.device("cuda") and current == []
    assert pick_device("cuda:1") == torch.device("cuda:1") and current == []
    assert [use_device("cuda:1")] == current == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="no device"):
        use_device("cuda:2")
    assert len(current) == 1


@pytest.fixture
def default_settings():
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


@pytest.mark.parametrize("name", PRECISION_NAMES)
def test_tf32_is_on_for_tf32_alone(gpus, default_settings, name):
    assert PRECISIONS[name].itemsize == (2 if "16" in name else 4)
    assert use_precision(name, torch.device("cuda")) == name
    on = name == "tf32"
    found = [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]
    assert [precision == "tf32" for precision in found] == [on, on]
    # What torch.compile reads raises RuntimeError if the two families of settings contradict each other.
    assert torch.get_float32_matmul_precision() == ("high" if on else "highest")
    assert torch.backends.cudnn.allow_tf32 == on


def test_devices_without_tf32_compute_in_fp32_and_say_so(gpus, default_settings, capsys):
    capability, _ = gpus
    capability[:] = [7, 5]
    for device in ("cpu", "mps", "cuda"):
        assert use_precision("tf32", torch.device(device)) == "fp32"
        assert capsys.readouterr().err == f"{device} has no TF32: computing in fp32\n"
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"


@pytest.mark.parametrize("device, precision", [("cuda", "tf32"), ("cuda", "bf16"), ("cuda", "fp32"), ("cpu", "bf16")])
def test_networks_are_laid_out_for_tensor_cores_unless_these_stay_idle(device, precision):
    network = nn.Conv2d(2, 2, 3)
    lay_out([network], torch.device(device), precision)
    channels_last = network.weight.is_contiguous(memory_format=torch.channels_last)
    assert channels_last == (device == "cuda" and precision != "fp32")


# --------------------------------------------------------------------------------------------------------------- memory


def count_faults(kept, megabytes):
    """Of the pages of a tensor: the exit status, at most 100. What a process keeps is set once and for all."""
    import resource

    if kept != "not":
        keep_freed_memory(torch.device("cpu"), large=kept == "large")
    for _ in range(12):  # alignment may want a little more than what was freed
        torch.ones(2**18 * megabytes)  # which are gone at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**18 * megabytes)
    sys.exit(min(100, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_memory_that_was_freed_serves_the_next_tensor():
    """Without page faults, of which new memory takes dozens, even in large pages: of 64 MB if large tensors are kept,
    else of 24."""
    faults = {}
    for case in (("not", 64), ("small", 64), ("large", 64), ("small", 24)):
        process = forked.start(count_faults, *case)
        process.join()
        faults[case] = process.exitcode
    assert [count > 16 for count in faults.values()] == [True, True, False, False]


def test_weights_that_were_on_a_device_for_a_while_are_not_copied_back():
    """There is only one device here: another type makes a copy, too, from which the numbers could not come back."""
    network = nn.Linear(4, 4)
    weights, places = [p.clone() for p in network.parameters()], [p.data_ptr() for p in network.parameters()]
    with pytest.raises(KeyError), temporarily_on(torch.bfloat16, network):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
        raise KeyError
    assert [p.data_ptr() for p in network.parameters()] == places
    assert all(torch.equal(p, before) for p, before in zip(network.parameters(), weights, strict=True))


def test_the_peak_of_memory_is_told_where_the_system_does(monkeypatch):
    cpu = torch.device("cpu")
    assert 0.01 < peak_memory(cpu)["memory_gb"] < 1000
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory(cpu) == {}
