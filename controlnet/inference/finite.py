"""A result that is not finite is an error that names the layer it comes from, instead of a black image."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from ldm.samplers import Denoise


def finite(compute: Callable[[], Tensor], networks: dict[str, nn.Module]) -> Tensor:
    """The result of `compute`, which runs `networks`. If it has NaN or infinite values, `compute` runs again to find
    the layer they come from, and FloatingPointError names it."""
    result = compute()
    if not result.isfinite().all():
        with stopping_at_bad_layers(networks):
            compute()
        raise FloatingPointError(sentence(" and ".join(networks), result))
    return result


class Watched:
    """A denoiser that keeps its inputs, so that its steps can be computed again to find a bad layer.

    Only the last result is looked at: NaN and infinity stay through the steps, and a look at each step would make the
    CPU wait for the GPU.
    """

    def __init__(self, denoise: Denoise, plainly: Callable[[], Denoise], networks: dict[str, nn.Module]):
        """`plainly` makes the same denoiser without compiled or replayed graphs, whose layers cannot be watched."""
        self.denoise, self.plainly, self.networks = denoise, plainly, networks
        self.steps: list[tuple[Tensor, Tensor, float]] = []

    def __call__(self, x: Tensor, t: Tensor, timestep: float) -> Tensor:
        self.steps.append((x, t, timestep))
        return self.denoise(x, t, timestep)

    def check(self, latents: Tensor) -> None:
        """Raises FloatingPointError if what was made of the denoiser's results is not finite."""
        if latents.isfinite().all():
            return
        denoise = self.plainly()
        with stopping_at_bad_layers(self.networks):
            for step in self.steps:
                output = denoise(*step)
                if not output.isfinite().all():
                    raise FloatingPointError(sentence("the sum of the guidance", output))
        raise FloatingPointError(sentence("the sampler", latents))


@contextmanager
def stopping_at_bad_layers(networks: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, the first layer whose output is not finite raises FloatingPointError."""
    handles = []
    for network, parent in networks.items():
        for name, layer in parent.named_modules():
            if not list(layer.children()):
                handles.append(layer.register_forward_hook(partial(check_output, f"{network}.{name}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_output(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
    if not output.isfinite().all():
        raise FloatingPointError(sentence(name, output))


def sentence(layer: str, output: Tensor) -> str:
    precision = str(output.dtype).removeprefix("torch.")
    remedy = "take a lower guidance or another checkpoint" if precision == "float32" else "take --precision fp32"
    if layer.startswith("vae.") and precision == "float32":
        remedy = "give another autoencoder with --vae"
    return f"{layer}, computed in {precision}, gives values that are not finite: {remedy}"
