"""What computes the UNet with its controls: as `exact` does, but compiled by PyTorch or replayed as CUDA graphs, or at
some of the steps only. Each is a `make_predictor` of `guided`."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from einops import rearrange
from torch import Tensor

from controlnet.common.graphs import Graphs
from controlnet.guidance import Branch, Predict, PreparedControl, controlled, exact
from controlnet.reuse import reusing
from ldm.fast.packed import Packed
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet

# Of the latents, in both branches of the guidance: four images of 512x512. On an H200 a step of eight images takes
# longer to compute than to launch, so recording would only cost time.
MOST_POSITIONS = 2 * 4 * 64 * 64


def predictor_for(
    sd: StableDiffusion, reuse: int, compile: bool, low_memory: bool, in_parts: bool
) -> Callable[[UNet], Predict]:
    """Raises ValueError for what cannot be compiled or reused. `in_parts` is set if the image is denoised in tiles."""
    if compile:
        check_compile(reuse, low_memory, sd.unet)
        return compiling()
    if reuse != 1:
        return reusing(reuse)
    return graphed if sd.device.type == "cuda" and not in_parts else exact  # each tile would be a graph of its own


@cache
def compiling() -> Callable[[UNet], Predict]:
    """With torch.compile: the same numbers to rounding.

    The graph is compiled anew for other shapes and when other controls act, not for another prompt, hint or step. On
    CUDA it is replayed as one CUDA graph ("reduce-overhead"): one launch in place of a thousand kernels'.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # here: 900 modules that nothing else needs

    torch.compiler.allow_in_graph(rearrange)  # as it is: to trace through einops takes most of the time
    compute = torch.compile(controlled, mode="reduce-overhead", dynamic=False)

    def make_predictor(unet: UNet) -> Predict:
        def predict(
            x: Tensor, t: Tensor, timestep: float, context: Tensor, controls: Sequence[PreparedControl], branch: Branch
        ) -> Tensor:
            try:
                return compute(unet, x, t, context, controls, branch).clone()  # a CUDA graph overwrites its output
            except BackendCompilerFailed as error:
                cause = str(error.inner_exception).splitlines()[0]
                raise ValueError(
                    f"torch.compile fails here ({cause}): it needs a C++ compiler, and Triton on CUDA. Install them, "
                    "or leave --compile out"
                ) from error

        return predict

    return make_predictor


def check_compile(reuse: int, low_memory: bool, unet: UNet | None = None) -> None:
    """Raises ValueError for what cannot be compiled."""
    if reuse > 1 or low_memory:
        other = "--reuse" if reuse > 1 else "--low-memory"
        raise ValueError(f"--compile and {other} exclude each other: leave one of them out")
    if unet is not None and any(isinstance(module, Packed) for module in unet.modules()):
        raise ValueError("packed weights cannot be compiled: load the model again, and do not pack it")


def graphed(unet: UNet) -> Predict:
    """As CUDA graphs: what `exact` does is recorded at the first step and replayed at the others. It is recorded again
    when other controls act, as their hints and masks, which are constant, are part of the graph."""
    graphs = Graphs()

    def predict(
        x: Tensor, t: Tensor, timestep: float, context: Tensor, controls: Sequence[PreparedControl], branch: Branch
    ) -> Tensor:
        def compute(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return controlled(unet, x, t, context, controls, branch)

        if x[:, 0].numel() > MOST_POSITIONS:
            return compute(x, t, context)
        return graphs.run((x.shape, branch, *map(id, controls)), compute, x, t, context)

    return predict
