"""When a computation is recorded as a CUDA graph, whose memory is its own from then on."""

import pytest
import torch
from tape import record_on_tapes

from controlnet.common import graphs

GB = 10**9
ROOM = graphs.leaves_room


@pytest.mark.parametrize("cached, room", [(0, True), (1, False)])
def test_a_graph_leaves_as_much_memory_as_it_takes(monkeypatch, cached, room):
    """On a GPU of 80 GB with 15 in use, the first computation takes 30 more at its peak and leaves 5, as moments. So
    60 are free, if PyTorch gives back what it keeps of freed memory: 30 for the graph and 30 for others."""
    tapes = record_on_tapes(monkeypatch)
    now = {"allocated": 15, "peak": 15, "free": 65}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["allocated"] * GB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["peak"] * GB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (now["free"] * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: now.update(free=80 - now["allocated"] - cached))
    monkeypatch.setattr(graphs, "leaves_room", ROOM)

    def compute(x):
        now.update(allocated=20, peak=45, free=35)
        return 2 * x

    replayed = graphs.recorded(compute, torch.device("cuda"))
    assert [replayed(torch.tensor(float(i))).item() for i in range(3)] == [0, 2, 4]
    assert len(tapes) == room


def test_the_inputs_that_it_was_recorded_with_may_change(monkeypatch):
    record_on_tapes(monkeypatch)
    compute, x = graphs.recorded(lambda x: 2 * x, torch.device("cuda")), torch.tensor(1.0)
    compute(x)
    x.fill_(5)
    first = compute(torch.tensor(3.0))
    assert (first.item(), compute(x).item(), first.item()) == (6, 10, 6)
