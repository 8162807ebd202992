"""When a computation is recorded as a CUDA graph, whose memory is its own from then on."""

import pytest
import torch
from tape import record_on_tapes

from controlnet.common import graphs

GB = 10**9


@pytest.mark.parametrize(
    "now, most, held, free, room",
    [
        (10, 30, 30, 20, True),  # 20 for the graph and 20 for others
        (10, 30, 30, 19, False),
        (10, 30, 12, 38, True),  # whether PyTorch holds it or nobody does
        (30, 30, 30, 0, True),  # it takes none
    ],
)
def test_a_graph_leaves_as_much_memory_as_it_takes(monkeypatch, now, most, held, free, room):
    for name, value in (("memory_allocated", now), ("max_memory_allocated", most), ("memory_reserved", held)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value * GB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GB, 80 * GB))
    assert graphs.leaves_room(torch.device("cuda")) is room


def test_without_room_it_is_computed_each_time(monkeypatch):
    tapes = record_on_tapes(monkeypatch)
    monkeypatch.setattr(graphs, "leaves_room", lambda device: False)
    compute = graphs.recorded(lambda x: 2 * x, torch.device("cuda"))
    assert [compute(torch.tensor(float(i))).item() for i in range(3)] == [0, 2, 4] and not tapes


def test_the_inputs_that_it_was_recorded_with_may_change(monkeypatch):
    record_on_tapes(monkeypatch)
    compute, x = graphs.recorded(lambda x: 2 * x, torch.device("cuda")), torch.tensor(1.0)
    compute(x)
    x.fill_(5)
    first = compute(torch.tensor(3.0))
    assert (first.item(), compute(x).item(), first.item()) == (6, 10, 6)
