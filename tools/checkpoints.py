"""Models from their files as they are, for programs that change files: in their own precision and architecture."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path

import torch

from controlnet import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.checkpoint import (
    BASE_PARTS,
    IGNORED,
    Checkpoint,
    CheckpointError,
    gather,
    open_checkpoint,
    save_checkpoint,
    without_weights,
)
from ldm.checkpoints.diffusers_layout import unet_from_diffusers
from ldm.checkpoints.key_maps import control_map
from ldm.checkpoints.recognise import Control, check_config, described_config, description_errors, recognise_control
from ldm.config import SD15, SD21, UNetConfig, dataclass_from_dict
from ldm.stable_diffusion import find
from ldm.unet import UNet
from tools.cli import DTYPES, note


def torch_dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, DTYPES[name]) if name else None


def load_base(
    path_or_preset: str, dtype: torch.dtype | None = None, prediction: str | None = None, ema: bool = False
) -> StableDiffusion:
    """In its file's precision unless another is given. Raises CheckpointError as `StableDiffusion.load` does."""
    note(f"reading {path_or_preset} ...")
    checkpoint = open_checkpoint(find(path_or_preset)[0])
    dtype = dtype or widest_dtype(checkpoint, (key for key in checkpoint.tensors if key.startswith(BASE_PARTS)))
    return StableDiffusion.load(path_or_preset, dtype=dtype, prediction=prediction, ema=ema)


def load_control(
    path: str, base: UNet | None = None, dtype: torch.dtype | None = None, global_average_pooling: bool | None = None
) -> ControlNet:
    """In its file's precision unless another is given. `base` is needed for a file that holds a difference only.

    Raises CheckpointError as `ControlNet.load` does, and for a difference without a base.
    """
    note(f"reading {path} ...")
    checkpoint = open_checkpoint(path)
    found = recognise_control(checkpoint)
    if found.difference and base is None:
        raise CheckpointError(f'"{path}" holds the difference to a base: name the base to add with --base')
    with without_weights():
        unet = base if found.difference else UNet(control_unet_config(checkpoint, found))
    own = (key for key in checkpoint.tensors if key.startswith(found.prefix) and not key.startswith(BASE_PARTS))
    dtype = dtype or widest_dtype(checkpoint, own)
    return ControlNet.load(path, unet, "cpu", dtype, global_average_pooling).requires_grad_(False)


def widest_dtype(checkpoint: Checkpoint, keys: Iterable[str]) -> torch.dtype:
    """The floating-point type that holds all of these tensors exactly; at least fp16, with which PyTorch can count."""
    found = {checkpoint.tensors[key].dtype for key in keys if key not in IGNORED and not key.startswith("model_ema.")}
    types = {dtype if dtype.itemsize > 1 else torch.float16 for dtype in found if dtype.is_floating_point}
    return reduce(torch.promote_types, types) if types else torch.float32


def control_unet_config(checkpoint: Checkpoint, found: Control) -> UNetConfig:
    """The UNet that a ControlNet was copied from: as our metadata or diffusers' configuration have it, else by shapes.

    Raises CheckpointError for an architecture that is described nowhere and is not that of SD 1.x or 2.x.
    """
    described = described_config(checkpoint)
    with description_errors(checkpoint):
        folder = found.prefix.rstrip(".") if found.layout == "diffusers" else None
        if described is not None:
            unet = dataclass_from_dict(UNetConfig, described["unet"])
        elif folder in checkpoint.configs:
            unet = unet_from_diffusers(checkpoint.configs[folder])
        else:
            unet = control_unet_by_shape(checkpoint, found)
        check_config(replace(SD15, unet=unet))
    return unet


def control_unet_by_shape(checkpoint: Checkpoint, found: Control) -> UNetConfig:
    for config in (SD15, SD21):
        if config.unet.context_width in context_widths(checkpoint, found.prefix):
            return config.unet
    raise CheckpointError(
        f'"{checkpoint.path}" is a ControlNet of an unknown architecture: expected one of SD 1.x or 2.x, or our '
        "description in its metadata"
    )


def context_widths(checkpoint: Checkpoint, prefix: str) -> set[int]:
    keys = (key for key in checkpoint.tensors if key.startswith(prefix) and key.endswith("attn2.to_k.weight"))
    return {checkpoint.shape(key)[-1] for key in keys}


def save_whole(path: Path, base: StableDiffusion, control: ControlNet, dtype: torch.dtype | None = None) -> None:
    """A base and its ControlNet in one file of the original layout, as ControlNet 1.0 was published."""
    tensors = gather(control, control_map(base.config.unet, control.config), dtype)
    for module, key_map in base.parts():
        tensors |= gather(module, key_map, dtype)
    described = {**base.config.to_dict(), "control": asdict(control.config)}
    save_checkpoint(path, tensors, {"config": json.dumps(described)})
