"""Whether images fit into memory, and how many at once, asked before they are tried: a system that runs out of memory
may end the process without a word."""

from functools import cache, partial
from pathlib import Path

import torch

from controlnet.common.images import Size, size_text
from controlnet.common.program import note
from controlnet.model import ControlNet
from ldm.checkpoints.load import without_weights
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet

LONG_ON_CPU = 2048 * 1024  # pixels
GLIBC_KEEPS = 2**25  # bytes: smaller blocks stay with the process when they are freed (`keep_freed_memory`)
CGROUPS = Path("/sys/fs/cgroup")


def check_memory(
    config: Config,
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    low_memory: bool,
    controls: int,
    tile_diffusion: bool = False,
    held: int = 0,
) -> None:
    """Raises ValueError for images that do not fit beside their networks, which are not loaded yet; a note for those
    that take long on a CPU. `controls` is the number of ControlNets, `held` the bytes of a base that is in memory
    already: it will be used, or freed."""
    needed = partial(needed_memory, config, size, dtype, device, controls=controls)
    free, now = free_memory(device), needed(low_memory=low_memory, tile_diffusion=tile_diffusion)
    free = None if free is None else free + held
    if free is not None and now > free:
        ways = {"--low-memory": (True, tile_diffusion), "--tile-diffusion": (low_memory, True)}
        ways |= {"--low-memory --tile-diffusion": (True, True)}
        enough = [way for way, (low, tiled) in ways.items() if needed(low_memory=low, tile_diffusion=tiled) <= free]
        raise ValueError(
            f"an image of {size_text(size)} needs about {now / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB "
            f"are free: {f'add {enough[0]} or ' if enough else ''}give a smaller --size"
        )
    if device.type == "cpu" and size[0] * size[1] >= LONG_ON_CPU:
        note(f"an image of {size_text(size)} takes long on a CPU: try a smaller --size first")


def fitting(count: int, device: torch.device, each: int) -> int:
    """How many of `count` images, at least 1, fit at once beside the networks that are loaded; each needs `each`
    bytes."""
    free = free_memory(device) if count > 1 else None
    return count if free is None else max(1, min(count, free // each))


# ----------------------------------------------------------------------------------------------------- what is needed


def needed_memory(
    config: Config,
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    low_memory: bool,
    controls: int,
    tile_diffusion: bool = False,
) -> int:
    """Bytes for one image and the networks.

    On a CPU decoding cannot use most of what sampling has freed: glibc keeps its smaller blocks, in pieces. With
    `low_memory` a CPU's networks stay in their files, which the system keeps in memory as far as there is room.
    """
    guided = guided_memory(config, size, dtype, low_memory, controls, tile_diffusion)
    decoding = decoding_memory(config, size, dtype, low_memory)
    height, width = at_once(config, size, tile_diffusion)
    encoding_hints = 3 * 16 * dtype.itemsize * height * width if controls else 0  # three maps of 16 channels
    kept = guided if device.type == "cpu" and feature_map(config, (height, width), dtype) < GLIBC_KEEPS else 0
    working = max(encoding_hints, guided, kept + decoding)
    base, control = parameters(config)
    return working if low_memory else working + dtype.itemsize * (base + controls * control)


def guided_memory(
    config: Config, size: Size, dtype: torch.dtype, one_by_one: bool, controls: int, tile_diffusion: bool = False
) -> int:
    """Bytes that one image holds at the peak of a guided step. As counted for SD, each branch of the guidance holds 37
    feature maps of the UNet's first level, or with many controls 20 and another 5 for each one's residuals. (The small
    base holds a few less.)"""
    maps = max(37, 20 + 5 * controls)
    working = (1 if one_by_one else 2) * maps * feature_map(config, at_once(config, size, tile_diffusion), dtype)
    # Each tile keeps the features of its hints, and tiles overlap: together twice the image at most.
    return working + tile_diffusion * controls * 2 * feature_map(config, size, dtype)


def at_once(config: Config, size: Size, tile_diffusion: bool) -> Size:
    """How much of an image the UNet sees at once."""
    return tuple(min(side, config.resolution) for side in size) if tile_diffusion else size


def feature_map(config: Config, size: Size, dtype: torch.dtype) -> int:
    """Bytes of one of the UNet's first level."""
    return config.unet.channels * dtype.itemsize * size[0] * size[1] // config.vae.downscale**2


def decoding_memory(config: Config, size: Size, dtype: torch.dtype, tiled: bool) -> int:
    """Bytes that decoding holds at its peak: as measured on a CPU, three feature maps as wide as the second level and
    as large as the image, or two with a tiled VAE. (Half a map of them is the kernels' workspace.)"""
    width = config.vae.channels * config.vae.multipliers[min(1, len(config.vae.multipliers) - 1)]
    return (2 if tiled else 3) * width * dtype.itemsize * size[0] * size[1]


def bytes_held(sd: StableDiffusion) -> int:
    """Bytes of a base in memory, for `check_memory`."""
    return sd.dtype.itemsize * parameters(sd.config)[0]


@cache
def parameters(config: Config) -> list[int]:
    """How many the base has, and a ControlNet."""
    with without_weights():
        networks = StableDiffusion(config), ControlNet(UNet(config.unet.text_to_image))
    return [sum(parameter.numel() for parameter in network.parameters()) for network in networks]


# -------------------------------------------------------------------------------------------------------- what is free


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        # To CUDA, memory that PyTorch has reserved is used, but the next tensors can have it.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = sum(1024 * int(values[name].split()[0]) for name in ("MemAvailable", "SwapFree") if name in values)
    in_container = free_in_cgroup(CGROUPS)
    return free if in_container is None else min(free, in_container)


def free_in_cgroup(root: Path) -> int | None:
    """Bytes that a container may still take, by version 2 of Linux's control groups or by version 1; None without a
    limit. Cached contents of files count as used there, but those called `inactive_file` are freed at once."""
    for folder, limit, used, reclaimable in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":  # version 1 has a number near 2^63 in its place
            return max(0, int(most) - now + int(statistics.get(reclaimable, 0)))
    return None
