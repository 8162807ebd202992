"""Saves from a thread: what is written is what was there when a save began, and no error of it is lost."""

import threading

import pytest
import torch
from small import small_control, small_sd

from controlnet.training.saving import Writer, on_cpu, with_weights

CPU = torch.device("cpu")


def test_a_copy_stays_what_it_was():
    weight = torch.nn.Parameter(torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last))
    state = {"step": 3, "part": {"weight": weight, "list": [torch.zeros(2), None, 0.5]}}
    copied = on_cpu(state, CPU)
    with torch.no_grad():
        weight.zero_()
        state["part"]["list"][0].fill_(7)
    assert torch.equal(copied["part"]["weight"].flatten(), torch.arange(24.0))
    assert copied["part"]["weight"].stride() == weight.stride() and not copied["part"]["weight"].requires_grad
    assert (
        copied["step"] == 3
        and copied["part"]["list"][0].tolist() == [0, 0]
        and copied["part"]["list"][1:] == [None, 0.5]
    )


def test_a_module_with_other_weights_shares_the_rest():
    sd = small_sd()
    control = small_control(sd)
    other = {name: torch.full_like(tensor, 2) for name, tensor in control.state_dict().items() if "zero_convs" in name}
    twin = with_weights(control, other)
    for name, tensor in twin.state_dict().items():
        own = control.state_dict()[name]
        assert torch.equal(tensor, other[name]) if name in other else tensor.data_ptr() == own.data_ptr()
    assert not any((control.state_dict()[name] == 2).all() for name in other)
    assert type(twin) is type(control) and len(list(twin.parameters())) == len(list(control.parameters()))


def fail():
    raise OSError("the disk is full")


def test_one_save_waits_for_the_other():
    writer, may_go_on, written = Writer(), threading.Event(), []
    with writer:
        writer.start(lambda: (may_go_on.wait(30), written.append(1)))
        writer.check()
        assert written == []
        threading.Timer(0.05, may_go_on.set).start()
        writer.start(lambda: written.append(2))
        assert written[0] == 1
    assert written == [1, 2]


def test_an_error_of_the_thread_is_raised_where_the_training_is():
    with pytest.raises(OSError, match="the disk is full"), Writer() as writer:
        writer.start(fail)
    with Writer() as writer:
        writer.start(fail)
        with pytest.raises(OSError, match="the disk is full"):
            writer.start(fail)
        writer.start(fail)
        with pytest.raises(OSError, match="the disk is full"):
            while True:
                writer.check()


def test_whatever_ends_a_run_waits_for_the_save():
    may_go_on, written = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.start(lambda: (may_go_on.wait(30), written.append(1)))
        threading.Timer(0.05, may_go_on.set).start()
        raise KeyboardInterrupt
    assert written == [1]
