"""Models from their files as they are, for programs that change files: in their own precision and architecture."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import torch

from controlnet.checkpoint import of_run, short_named
from controlnet.common.program import note
from controlnet.layouts import ControlFile, context_widths, control_map, recognise_control
from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.diffusers import unet_from_diffusers
from ldm.checkpoints.load import BASE_PARTS, IGNORED, IGNORED_BESIDE_BASE, load_parts, without_weights
from ldm.checkpoints.open import Checkpoint, open_checkpoint
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import described_config, description_errors, maps_in, open_base
from ldm.checkpoints.save import gather, save_checkpoint
from ldm.checkpoints.stored import CheckpointError
from ldm.config import PRESETS, SD15, SD21, TINY, Config, UNetConfig, dataclass_from_dict
from ldm.unet import UNet


def load_base(path_or_preset: str, dtype: torch.dtype | None = None, ema: bool = False, **arguments) -> StableDiffusion:
    """In its file's precision unless another is given; `arguments` are those of `open_base`.

    Raises CheckpointError as `StableDiffusion.load` does.
    """
    note(f"reading {path_or_preset} ...")
    dtype = dtype or base_dtype(open_base(path_or_preset, **arguments).checkpoint)
    return StableDiffusion.load(path_or_preset, dtype=dtype, ema=ema, **arguments)


def load_unet(path_or_preset: str) -> UNet:
    """Of a base, in its file's precision: what a ControlNet is a copy of. The other parts need not be in the file.

    Raises CheckpointError as `load_base` does.
    """
    note(f"reading {path_or_preset} ...")
    base = open_base(path_or_preset)
    with without_weights():
        unet = UNet(base.config.unet)
    key_map, *_ = maps_in(base.checkpoint, base.config)
    others = tuple(start for start in BASE_PARTS if not key_map.prefix.startswith(start))
    load_parts(base.checkpoint, [(unet, key_map)], (*others, *IGNORED_BESIDE_BASE), base_dtype(base.checkpoint))
    return unet.eval().requires_grad_(False)


def find_model(name: str) -> tuple[Path, Config | None]:
    """The file of a base or a ControlNet by its path or any of its names, and the preset if a base's name tells.

    Raises CheckpointError for a short name of several ControlNets. The file need not exist.
    """
    path, preset = find(name)
    if path.exists():
        return of_run(path), preset
    files = [file for preset in PRESETS for file in short_named(name, preset)]
    if len(files) > 1:
        names = " or ".join(file.name for file in files)
        raise CheckpointError(f'"{name}" is short for several ControlNets in {files[0].parent}: say {names}')
    return (files or [path])[0], None


def load_control(
    name: str, base: UNet | None = None, dtype: torch.dtype | None = None, global_average_pooling: bool | None = None
) -> ControlNet:
    """In its file's precision unless another is given. `base` is needed for a difference or a Control-LoRA.

    Raises CheckpointError as `ControlNet.load` does, and for one of these without a base.
    """
    note(f"reading {name} ...")
    path, _ = find_model(name)
    checkpoint = open_checkpoint(path)
    found = recognise_control(checkpoint)
    if found.needs_base and base is None:
        raise CheckpointError(f'"{path}" holds the difference to a base: name the base to add with --base')
    with without_weights():
        unet = base if found.needs_base else UNet(control_unet_config(checkpoint, found))
    own = (key for key in checkpoint.tensors if key.startswith(found.prefix) and not key.startswith(BASE_PARTS))
    dtype = dtype or widest_dtype(checkpoint, own)
    return ControlNet.load(path, unet, "cpu", dtype, global_average_pooling)


def base_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The precision of a base's file."""
    return widest_dtype(checkpoint, (key for key in checkpoint.tensors if key.startswith(BASE_PARTS)))


def widest_dtype(checkpoint: Checkpoint, keys: Iterable[str]) -> torch.dtype:
    """The type that holds all of these floating-point tensors exactly; at least fp16, in which PyTorch computes."""
    found = {checkpoint.tensors[key].dtype for key in keys if key not in IGNORED and not key.startswith("model_ema.")}
    types = {dtype if dtype.itemsize > 1 else torch.float16 for dtype in found if dtype.is_floating_point}
    return reduce(torch.promote_types, types) if types else torch.float32


def control_unet_config(checkpoint: Checkpoint, found: ControlFile) -> UNetConfig:
    """The UNet that a ControlNet was copied from: as our metadata or diffusers' configuration have it, else by shapes.

    Raises CheckpointError for an architecture that is described nowhere and is not that of SD 1.x or 2.x or the small
    base's.
    """
    described = described_config(checkpoint)
    with description_errors(checkpoint):
        folder = found.prefix.rstrip(".") if found.layout == "diffusers" else None
        if described is not None:
            return dataclass_from_dict(UNetConfig, described["unet"]).without_inpainting
        if folder in checkpoint.configs:
            return unet_from_diffusers(checkpoint.configs[folder]).without_inpainting
    for config in (SD15, SD21, TINY):
        if config.unet.context_width in context_widths(checkpoint, found.prefix):
            return config.unet
    raise CheckpointError(
        f'"{checkpoint.path}" is a ControlNet of an unknown architecture: expected one of SD 1.x or 2.x, or our '
        "description in its metadata"
    )


def save_whole(path: Path, base: StableDiffusion, control: ControlNet) -> None:
    """A base and its ControlNet in one file of the original layout, as ControlNet 1.0 was published."""
    tensors = gather(control, control_map(base.config.unet, control.config))
    for module, key_map in base.parts():
        tensors |= gather(module, key_map)
    described = {**base.config.to_dict(), "control": asdict(control.config)}
    save_checkpoint(path, tensors, {"config": json.dumps(described)})
