"""The UNet with its controls as CUDA graphs."""

from collections.abc import Sequence

from torch import Tensor

from controlnet.common.graphs import Graphs
from controlnet.guidance import Branch, Predict, PreparedControl, controlled
from ldm.unet import UNet

# Of the latents, in both branches of the guidance: four images of 512x512. On an H200 a step of eight images takes
# longer to compute than to launch, so recording would only cost time.
MOST_POSITIONS = 2 * 4 * 64 * 64


def graphed(unet: UNet) -> Predict:
    """A `make_predictor` of `guided` that records what `exact` does at the first step, and replays it at the others.

    It records again when other controls act: their hints and masks, which are constant, are part of the graph.
    """
    graphs = Graphs()

    def predict(
        x: Tensor, t: Tensor, timestep: float, context: Tensor, controls: Sequence[PreparedControl], branch: Branch
    ) -> Tensor:
        def compute(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return controlled(unet, x, t, context, controls, branch)

        key = x.shape, branch, tuple(map(id, controls))
        if x[:, 0].numel() > MOST_POSITIONS:
            return compute(x, t, context)
        return graphs.run(key, compute, x, t, context)

    return predict
