"""The device to compute on, the precisions it computes in, its memory, and optional packages."""

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
    """The device called `name`; for None the default CUDA device if there is one, otherwise the CPU.

    Raises ValueError for a name that PyTorch does not know and for a device that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'the device is "{name}", expected cpu, cuda, cuda:1 ... or mps') from error
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        found = ", ".join(f"{kind} ({count})" for kind, count in available.items() if count)
        raise ValueError(f'PyTorch finds no device "{name}" here, only {found}: choose one of these')
    return device


def optional(module: str, what: str) -> ModuleType:
    """Imports a module of an optional package, which only `what` needs. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(f"{what} needs the package {package}: `pip install {package}`, or leave it out") from error


def peak_memory(device: torch.device) -> dict[str, float]:
    """In GB: on a GPU what PyTorch has allocated at most and what it has reserved for that, on a CPU the peak of the
    whole process."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def keep_freed_memory(device: torch.device, large: bool) -> None:
    """On a CPU: freed memory stays with the process, for the next tensors. Has an effect with glibc only.

    By default glibc returns large blocks to the system and gets the next one page by page, filled with zeros, which
    takes 40 % of a training step of SD 1.5 at 256x256. `large` also keeps blocks above 32 MB: good for gradients, whose
    sizes repeat at every step, whereas the VAE's activations would fragment the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type == "cpu" and mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # from glibc's malloc.h
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        if large:
            mallopt(M_MMAP_MAX, 0)
        else:
            mallopt(M_MMAP_THRESHOLD, 2**25)


@contextmanager
def temporarily_on(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Moves modules to `device` and, on leaving, back to where they were."""
    homes = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
