"""A result that is not finite stops with the name of the layer it comes from, instead of a black picture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def finite(compute: Callable[[], Tensor], networks: dict[str, nn.Module]) -> Tensor:
    """The result of `compute`, which runs `networks`. Raises FloatingPointError if it has NaN or infinite values.

    Only then it is computed a second time, with a look at every layer: a look costs a GPU a halt.
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

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not output.isfinite().all():
                raise FloatingPointError(sentence(name, output))

        return hook

    layers = [
        (f"{network}.{name}", layer)
        for network, parent in networks.items()
        for name, layer in parent.named_modules()
        if not list(layer.children())
    ]
    handles = [layer.register_forward_hook(look(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sentence(layer: str, output: Tensor) -> str:
    precision = str(output.dtype).removeprefix("torch.")
    remedy = "take a lower guidance or another checkpoint" if precision == "float32" else "take float32 (--dtype fp32)"
    return f"{layer}, computed in {precision}, gives values that are not finite: {remedy}"
