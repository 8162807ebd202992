"""Whether images fit into memory, and how many at once, asked before they are tried: a system that runs out of memory
may end the process without a word."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from controlnet.common.images import Size, size_text
from controlnet.common.program import note
from controlnet.model import ControlNet
from ldm.checkpoints.load import without_weights
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet

LARGEST_BATCH = 16  # by default: a larger one fills no GPU better, and its first image comes later
LONG_ON_CPU = 2048 * 1024  # pixels
GLIBC_KEEPS = 2**25  # bytes: smaller blocks stay with the process when they are freed (`keep_freed_memory`)
CGROUPS = Path("/sys/fs/cgroup")
WAYS = {  # to need less
    "--low-memory": {"low_memory": True},
    "--tile-diffusion": {"tile_diffusion": True},
    "--low-memory --tile-diffusion": {"low_memory": True, "tile_diffusion": True},
}


@dataclass(frozen=True)
class Plan:
    """An image to be made, and how."""

    config: Config
    size: Size
    dtype: torch.dtype
    controls: int  # how many ControlNets
    low_memory: bool = False
    tile_diffusion: bool = False

    def memory(self, device: torch.device) -> int:
        """Bytes for the image and the networks.

        On a CPU decoding cannot use most of what sampling has freed: glibc keeps its smaller blocks, in pieces. With
        `low_memory` a CPU's networks stay in their files, which the system keeps in memory as far as there is room, and
        a GPU has those alone that sample, and then the one that decodes.
        """
        guided, decoding = self.guided(), decoding_memory(self.config, self.size, self.dtype, self.low_memory)
        height, width = at_once = self.at_once()
        encoding_hints = 3 * 16 * self.dtype.itemsize * height * width if self.controls else 0  # 3 maps of 16 channels
        kept = guided if device.type == "cpu" and self.feature_map(at_once) < GLIBC_KEEPS else 0
        to_sample, to_decode = self.networks(device)
        return max(to_sample + max(encoding_hints, guided), to_decode + kept + decoding)

    def networks(self, device: torch.device) -> tuple[int, int]:
        """Bytes of those that are in memory during sampling and during decoding."""
        unet, vae, text_encoder, control = (self.dtype.itemsize * count for count in parameters(self.config))
        to_sample = unet + self.controls * control
        if self.low_memory:
            return (0, 0) if device.type == "cpu" else (to_sample, vae)
        return (to_sample + vae + text_encoder,) * 2

    def guided(self) -> int:
        """Bytes that the image holds at the peak of a guided step. As counted for SD, each branch of the guidance holds
        37 feature maps of the UNet's first level, or with many controls 20 and another 5 for each one's residuals. (The
        small base holds a few less.)"""
        maps = max(37, 20 + 5 * self.controls)
        working = (1 if self.low_memory else 2) * maps * self.feature_map(self.at_once())
        # Each tile keeps the features of its hints, and tiles overlap: together twice the image at most.
        return working + self.tile_diffusion * self.controls * 2 * self.feature_map(self.size)

    def at_once(self) -> Size:
        """How much of the image the UNet sees at once."""
        return tuple(min(side, self.config.resolution) for side in self.size) if self.tile_diffusion else self.size

    def feature_map(self, size: Size) -> int:
        """Bytes of one of the UNet's first level."""
        return self.config.unet.channels * self.dtype.itemsize * size[0] * size[1] // self.config.vae.downscale**2


def check_memory(plan: Plan, device: torch.device, held: int = 0) -> None:
    """Raises ValueError for an image that does not fit beside its networks, which are not loaded yet; a note for one
    that takes long on a CPU. `held` are the bytes of a base that is in memory already: it will be used, or freed."""
    needed, free = plan.memory(device), free_memory(device)
    if free is not None and needed > free + held:
        enough = [way for way, how in WAYS.items() if replace(plan, **how).memory(device) <= free + held]
        raise ValueError(
            f"an image of {size_text(plan.size)} needs about {needed / 1e9:.1f} GB of memory, but "
            f"{(free + held) / 1e9:.1f} GB are free: {f'add {enough[0]} or ' if enough else ''}give a smaller --size"
        )
    if device.type == "cpu" and plan.size[0] * plan.size[1] >= LONG_ON_CPU:
        note(f"an image of {size_text(plan.size)} takes long on a CPU: try a smaller --size first")


def default_batch_size(plan: Plan, count: int, device: torch.device) -> int:
    """How many of `count` images are made at once: on CUDA, which at batch 1 mostly waits for its next kernel, as many
    as fit in memory, up to 16; elsewhere one. (Decoding splits a batch that does not fit then.)"""
    return fitting(min(count, LARGEST_BATCH), device, plan.guided()) if device.type == "cuda" else 1


def fitting(count: int, device: torch.device, each: int) -> int:
    """How many of `count` images, at least 1, fit at once beside the networks that are loaded; each needs `each`
    bytes."""
    free = free_memory(device) if count > 1 else None
    return count if free is None else max(1, min(count, free // each))


def decoding_memory(config: Config, size: Size, dtype: torch.dtype, tiled: bool) -> int:
    """Bytes that decoding holds at its peak: as measured on a CPU, three feature maps as wide as the second level and
    as large as the image, or two with a tiled VAE. (Half a map of them is the kernels' workspace.)"""
    width = config.vae.channels * config.vae.multipliers[min(1, len(config.vae.multipliers) - 1)]
    return (2 if tiled else 3) * width * dtype.itemsize * size[0] * size[1]


def bytes_held(sd: StableDiffusion) -> int:
    """Bytes of a base in memory, for `check_memory`."""
    *base, _ = parameters(sd.config)
    return sd.dtype.itemsize * sum(base)


@cache
def parameters(config: Config) -> tuple[int, ...]:
    """How many the UNet has, the autoencoder, the text encoder, and a ControlNet."""
    with without_weights():
        sd, control = StableDiffusion(config), ControlNet(UNet(config.unet.without_inpainting))
    networks = sd.unet, sd.vae, sd.text_encoder, control
    return tuple(sum(parameter.numel() for parameter in network.parameters()) for network in networks)


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
