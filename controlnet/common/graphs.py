"""CUDA graphs: a recorded computation is one launch in place of those of a thousand kernels, which take a CPU longer
than a fast GPU needs to compute them. The kernels are the same, and so are the bits."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class Graph:
    """`compute`, a function of tensors that always have the shapes of `inputs`, as a CUDA graph in the pool `memory`.

    `compute` has to have run once: then libraries choose kernels and make their workspaces.
    """

    def __init__(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], memory: tuple[int, int]):
        self.inputs = [tensor.clone() for tensor in inputs]  # whose addresses are in the graph, as the output's is
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile, as the one that pins memory does.
        with torch.cuda.graph(self.graph, pool=memory, capture_error_mode="thread_local"):
            self.output = compute(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay overwrites it


class Graphs:
    """Graphs by a key that tells one computation from another. No two run at once, so all share their memory."""

    def __init__(self):
        self.ways: dict[Hashable, Callable[..., Tensor]] = {}
        self.memory = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Computes the first time and replays from then on, or computes again where there is no room for a graph."""
        if key in self.ways:
            return self.ways[key](*inputs)
        device = inputs[0].device
        before = torch.cuda.memory_allocated(device)
        output = compute(*inputs)
        room = leaves_room(torch.cuda.max_memory_allocated(device) - before, device)
        self.ways[key] = Graph(compute, inputs, self.memory) if room else compute
        return output


def leaves_room(taken: int, device: torch.device) -> bool:
    """Whether a graph, which keeps the bytes `taken`, leaves as many for everything else."""
    torch.cuda.empty_cache()  # what it returns to the device is in no graph
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * taken <= free


def recorded(compute: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """`compute`, recorded at the first inputs of each shape and then replayed, on CUDA; elsewhere as it is."""
    if device.type != "cuda":
        return compute
    graphs = Graphs()
    return lambda *inputs: graphs.run(tuple(tensor.shape for tensor in inputs), compute, *inputs)
