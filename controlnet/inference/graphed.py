"""The UNet with its controls as CUDA graphs: a step is one launch in place of a thousand kernels', which take a CPU
longer to ask for than a fast GPU to compute. The kernels are the same, and so are the bits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from controlnet.guidance import Branch, Predict, PreparedControl, controlled
from ldm.unet import UNet

# Of the latents, both branches of the guidance counted: four images of 512x512. On an H200 a step of eight takes longer
# to compute than to ask for, and recording would only cost time.
MOST_POSITIONS = 2 * 4 * 64 * 64


def graphed(unet: UNet) -> Predict:
    """A `make_predictor` of `guided` that records what `exact` does at the first step, and replays it at the others.

    It records again when other controls act. Their hints and masks, which are constant, are part of the graph.
    """
    graphs = {}

    def predict(
        x: Tensor, t: Tensor, timestep: int, context: Tensor, controls: Sequence[PreparedControl], branch: Branch
    ) -> Tensor:
        def compute(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return controlled(unet, x, t, context, controls, branch)

        key = x.shape, branch, tuple(map(id, controls))
        if x[:, 0].numel() > MOST_POSITIONS:
            return compute(x, t, context)
        if key in graphs:
            return graphs[key](x, t, context)
        graphs[key] = Graph(compute, x, t, context)
        return graphs[key].first

    return predict


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
