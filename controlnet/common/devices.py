"""Which device to compute on, in which precision, with how much memory, and with which packages beside the required."""

import ctypes
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None is the first CUDA device if there is one, else the CPU.

    Raises ValueError for a name that is none, or a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'the device is "{name}", expected cpu, cuda, cuda:1 ... or mps') from error
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        there = ", ".join(f"{kind} ({count})" for kind, count in available.items() if count)
        raise ValueError(f'there is no device "{name}" for this PyTorch, only {there}: take one of these')
    return device


def optional(module: str, what: str) -> ModuleType:
    """A module of a package that nothing but `what` needs. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(f"{what} needs the package {package}: `pip install {package}`, or leave it out") from error


def peak_memory(device: torch.device) -> float:
    """The most that was allocated so far, in GB: of the device, or on a CPU of this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def keep_freed_memory(device: torch.device, large: bool) -> None:
    """On a CPU: memory that is freed stays with this program, for the tensors that come next.

    glibc gives it back to the system, and gets the next block page by page, filled with zeros: 40 % of the time of a
    training step of SD 1.5 at 256x256. `large` keeps blocks above 32 MB, too: gradients are as large at every step,
    but the maps of an autoencoder leave holes between them. Elsewhere than with glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type == "cpu" and mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # from glibc's malloc.h
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        if large:
            mallopt(M_MMAP_MAX, 0)
        else:
            mallopt(M_MMAP_THRESHOLD, 2**25)


def out_of_memory(error: BaseException) -> bool:
    """CPUs and other devices have no exception of their own for it."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@contextmanager
def borrowed(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Modules on `device` for a while, then back where they were."""
    before = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, before, strict=True):
            module.to(home)
