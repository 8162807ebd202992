"""Saves that do not hold up the training: everything is copied to the CPU, and a thread writes the copy."""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def on_cpu(state: dict, device: torch.device) -> dict:
    """A copy of nested dictionaries whose tensors are on the CPU and nobody else's: what comes from a GPU goes to
    pinned memory, at the full speed of the bus."""
    cuda = device.type == "cuda"
    copied = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", non_blocking=cuda, copy=True), state)
    if cuda:
        torch.cuda.synchronize(device)
    return copied


def with_weights(module: nn.Module, state: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """The same module with the parameters in `state` in place of its own; the others are shared, and nothing is
    copied."""
    other = copy.copy(module)
    other._parameters = {name: state.get(prefix + name, own) for name, own in module._parameters.items()}
    children = module._modules.items()
    other._modules = {name: with_weights(child, state, f"{prefix}{name}.") for name, child in children}
    return other


class Writer:
    """A thread that writes one save at a time; the next one waits for it, and so does the end of the `with`."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1, "save")
        self.save: Future | None = None

    def start(self, write: Callable, *arguments) -> None:
        """Raises the error of the save before, as all methods do."""
        self.wait()
        self.save = self.thread.submit(write, *arguments)

    def check(self) -> None:
        """Only raises the error of a save, without waiting for it."""
        if self.save is not None and self.save.done():
            self.wait()

    def wait(self) -> None:
        save, self.save = self.save, None
        if save is not None:
            save.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, error_type: type | None, *_) -> None:
        self.thread.shutdown()  # which waits, whatever has ended the run
        if error_type is None:
            self.wait()
