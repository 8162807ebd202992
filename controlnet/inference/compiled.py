"""The UNet with its controls as one graph of torch.compile: the same numbers up to rounding, computed sooner."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from einops import rearrange
from torch import Tensor

from controlnet.guidance import Branch, Predict, PreparedControl, controlled
from ldm.fast.packed import Packed
from ldm.unet import UNet


@cache
def compiling() -> Callable[[UNet], Predict]:
    """A `make_predictor` of `guided` that computes what `exact` does.

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
