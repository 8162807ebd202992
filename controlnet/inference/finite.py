"""A result that is not finite is an error that names the layer it comes from, instead of a black image."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def finite(compute: Callable[[], Tensor], networks: dict[str, nn.Module]) -> Tensor:
    """The result of `compute`, which runs `networks`. Raises FloatingPointError if it has NaN or infinite values.

    Layers are checked only after a failure, when it is computed again: each check makes the CPU wait for the GPU.
    """
    result = compute()
    if not result.isfinite().all():
        with stopping_at_bad_layers(networks):
            compute()
        raise FloatingPointError(sentence("the sum of the guidance", result))
    return result


@contextmanager
def stopping_at_bad_layers(networks: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, the first layer whose output is not finite raises FloatingPointError."""
    handles = []
    for network, parent in networks.items():
        for name, layer in parent.named_modules():
            if not list(layer.children()):
                handles.append(layer.register_forward_hook(check_output(f"{network}.{name}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_output(layer: str) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not output.isfinite().all():
            raise FloatingPointError(sentence(layer, output))

    return hook


def sentence(layer: str, output: Tensor) -> str:
    precision = str(output.dtype).removeprefix("torch.")
    remedy = "take a lower guidance or another checkpoint" if precision == "float32" else "take float32 (--dtype fp32)"
    if layer.startswith("vae.") and precision == "float32":
        remedy = "give another autoencoder with --vae"
    return f"{layer}, computed in {precision}, gives values that are not finite: {remedy}"
