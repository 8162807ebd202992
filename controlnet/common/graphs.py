"""CUDA graphs: a recorded computation is one launch in place of a thousand kernels', which take a CPU longer to ask for
than a fast GPU to compute. The kernels are the same, and so are the bits."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Graph:
    """`compute`, a function of tensors that always have the shapes of `inputs`, as a CUDA graph."""

    def __init__(self, compute: Callable[..., Tensor], *inputs: Tensor):
        self.inputs = [tensor.clone() for tensor in inputs]  # whose addresses are in the graph, as the output's is
        # A first time as usual, while libraries choose kernels and make their workspaces.
        self.first = compute(*self.inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = compute(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay overwrites it


class Graphs(dict[Hashable, Graph]):
    """By what tells one computation from another."""

    def run(self, key: Hashable, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Recorded the first time, and then replayed."""
        if key in self:
            return self[key](*inputs)
        self[key] = Graph(compute, *inputs)
        return self[key].first


def recorded(compute: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """`compute`, recorded at the first inputs of each shape and then replayed, on CUDA; elsewhere as it is."""
    if device.type != "cuda":
        return compute
    graphs = Graphs()
    return lambda *inputs: graphs.run(tuple(tensor.shape for tensor in inputs), compute, *inputs)
