"""CUDA graphs without CUDA: a tape records a computation and replays it on the CPU."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlnet.common import graphs


class Tape(TorchDispatchMode):
    """Stands for a CUDA graph: keeps each operation with the very tensors that it read and wrote.

    A graph only records. A tape has to compute, and then puts back what that has changed.
    """

    tapes = []

    def __init__(self):
        super().__init__()
        self.calls, self.replays, self.before = [], 0, {}
        self.tapes.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for written, argument in zip(func._schema.arguments, args, strict=False):
            if written.alias_info and written.alias_info.is_write:
                for tensor in tree_leaves(argument):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        output = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, output))
        return output

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, output in self.calls:
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


@contextmanager
def recording(tape, pool, capture_error_mode):
    with tape:
        yield
    with torch.no_grad():
        for tensor, before in tape.before.values():
            tensor.copy_(before)


def record_on_tapes(monkeypatch):
    """-> the list of tapes to come."""
    monkeypatch.setattr(Tape, "tapes", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "leaves_room", lambda taken, device: True)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    return Tape.tapes
