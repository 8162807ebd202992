"""CUDA graphs: a recorded computation is one launch in place of a thousand kernels', which take a CPU longer to ask for
than a fast GPU to compute. The kernels are the same, and so are the bits."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class Graph:
    """`compute`, a function of tensors that always have the shapes of `inputs`, as a CUDA graph.

    It has to be computed once before, for libraries choose kernels and make their workspaces then.
    """

    def __init__(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], memory: tuple[int, int]):
        self.inputs = [tensor.clone() for tensor in inputs]  # whose addresses are in the graph, as the output's is
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, which may read data meanwhile, are not looked at.
        with torch.cuda.graph(self.graph, pool=memory, capture_error_mode="thread_local"):
            self.output = compute(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay overwrites it


class Graphs:
    """By what tells one computation from another. No two of them run at once, so they share their memory."""

    def __init__(self):
        self.graphs: dict[Hashable, Graph] = {}
        self.memory = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Computed and recorded the first time, and then replayed."""
        if key in self.graphs:
            return self.graphs[key](*inputs)
        output = compute(*inputs)
        if leaves_room(output.device):
            self.graphs[key] = Graph(compute, inputs, self.memory)
        return output


def leaves_room(device: torch.device) -> bool:
    """Whether a graph of what was just computed leaves as much memory as it takes: what it computes with stays its own,
    and other computations need some, too."""
    now, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * (most - now) <= free + torch.cuda.memory_reserved(device) - now


def recorded(compute: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """`compute`, recorded at the first inputs of each shape and then replayed, on CUDA; elsewhere as it is."""
    if device.type != "cuda":
        return compute
    graphs = Graphs()
    return lambda *inputs: graphs.run(tuple(tensor.shape for tensor in inputs), compute, *inputs)
