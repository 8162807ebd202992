"""The device to compute on, the precisions it computes in, its memory, and optional packages."""

import ctypes
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from .program import note

# Names of precisions, and the types of the networks. "tf32" is also a setting of CUDA's: see `use_precision`.
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


def use_device(name: str | None) -> torch.device:
    """`pick_device`, and a CUDA device with a number becomes the process's current one: otherwise calls that name no
    device would open a context on the first GPU, which takes memory there."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def use_precision(name: str, device: torch.device) -> str:
    """Lets CUDA use TF32 in fp32 matrix products and convolutions for "tf32" alone: by default PyTorch uses it in all
    convolutions. Returns `name` or, with a note, "fp32" where `device` has no TF32."""
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):  # Ampere
        note(f"{device} has no TF32: computing in fp32")
        name = "fp32"
    # By their older names: torch.compile reads these, and PyTorch refuses that after the newer `fp32_precision` is set.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def lay_out(networks: Iterable[nn.Module], device: torch.device, precision: str) -> None:
    """Channels last on CUDA, which the convolutions of tensor cores read, unless in full fp32. (Not for the VAE, whose
    large maps PyTorch's group norms would copy into another layout, a quarter of its time.)"""
    if device.type == "cuda" and precision != "fp32":
        for network in networks:
            network.to(memory_format=torch.channels_last)


def optional(module: str, what: str) -> ModuleType:
    """Imports a module of an optional package, which only `what` needs. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(f"{what} needs the package {package}: `pip install {package}`, or leave it out") from error


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Sends a tensor to `device`, to CUDA from pinned memory, so that the CPU need not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """In GB: on a GPU the most that PyTorch has allocated and reserved, on a CPU the peak of the whole process, and
    nothing on Windows, which does not tell."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}
    try:
        import resource
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def keep_freed_memory(device: torch.device, large: bool) -> None:
    """Keeps memory that is freed on a CPU with the process, for the next tensors (with glibc alone).

    By default glibc returns large blocks to the system and gets the next ones page by page, filled with zeros, which
    takes 40 % of a training step of SD 1.5 at 256x256. `large` also keeps blocks above 32 MB: good for gradients, whose
    sizes repeat at every step, while the VAE's activations would fragment the heap.
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
    """Inside, modules are on `device`; afterwards they are back where they were. The weights must not change meanwhile:
    instead of copying them back, the old ones are used again."""
    homes = [next(module.parameters()).device for module in modules]
    left = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for parameter, data in left:
            parameter.data = data
        for module, home in zip(modules, homes, strict=True):
            module.to(home)  # its buffers
