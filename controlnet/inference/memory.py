"""Whether an image of some size fits into memory, before it is tried: a system that runs out of it may end the process
without a word."""

from pathlib import Path

import torch

from controlnet.common.images import Size, size_text
from controlnet.common.program import note
from ldm.config import Config

LONG_ON_CPU = 2048 * 1024  # pixels


def check_memory(config: Config, size: Size, dtype: torch.dtype, device: torch.device, low_memory: bool) -> None:
    """Raises ValueError for images that do not fit; a note for those that take long on a CPU."""
    free, needed = free_memory(device), decoding_memory(config, size, dtype, low_memory)
    if free is not None and needed > free:
        tiled = not low_memory and decoding_memory(config, size, dtype, tiled=True) <= free
        raise ValueError(
            f"an image of {size_text(size)} needs about {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB "
            f"are free: {'add --low-memory or ' if tiled else ''}give a smaller --size"
        )
    if device.type == "cpu" and size[0] * size[1] >= LONG_ON_CPU:
        note(f"an image of {size_text(size)} takes long on a CPU: try a smaller --size first")


def fitting_batch(
    config: Config, size: Size, dtype: torch.dtype, device: torch.device, count: int, low_memory: bool, controls: int
) -> int:
    """How many of `count` images with this many controls fit into the memory that is free on CUDA, sampled and decoded
    at once: at least 1. On other devices 1."""
    return decoding_batch(config, size, dtype, device, count, low_memory) if device.type == "cuda" else 1


def decoding_batch(
    config: Config, size: Size, dtype: torch.dtype, device: torch.device, count: int, tiled: bool
) -> int:
    """How many of `count` images fit into free memory when they are decoded at once: at least 1."""
    free = free_memory(device) if count > 1 else None
    return count if free is None else max(1, min(count, free // decoding_memory(config, size, dtype, tiled)))


def decoding_memory(config: Config, size: Size, dtype: torch.dtype, tiled: bool) -> int:
    """Bytes that decoding holds at its peak, the most of all: as measured on a CPU, three feature maps as wide as the
    second level and as large as the image, with a tiled VAE two. (Half a map of that are the kernels' workspaces. The
    guided UNet with a ControlNet takes about half.)"""
    width = config.vae.channels * config.vae.multipliers[min(1, len(config.vae.multipliers) - 1)]
    return (2 if tiled else 3) * width * dtype.itemsize * size[0] * size[1]


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return sum(1024 * int(values[name].split()[0]) for name in ("MemAvailable", "SwapFree") if name in values)
