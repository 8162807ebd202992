"""Models from their files as they are, for programs that change files: in their own precision and architecture."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path

import torch

from controlnet.checkpoint import of_run, short_named
from controlnet.common.program import note
from controlnet.layouts import ControlFile, context_widths, control_map, recognise_control
from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.diffusers import unet_from_diffusers
from ldm.checkpoints.key_maps import Layout
from ldm.checkpoints.kinds import CONTROL, kind
from ldm.checkpoints.load import (
    BASE_PARTS,
    FAMILIES,
    IGNORED,
    IGNORED_BESIDE_BASE,
    PARTS,
    load_parts,
    without_weights,
)
from ldm.checkpoints.open import Checkpoint, open_checkpoint
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import (
    BaseFile,
    described_config,
    description_errors,
    identify,
    is_base,
    maps_in,
    open_base,
)
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
    """The floating-point type that holds all of these tensors exactly; at least fp16, with which PyTorch can count."""
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
            return dataclass_from_dict(UNetConfig, described["unet"]).text_to_image
        if folder in checkpoint.configs:
            return unet_from_diffusers(checkpoint.configs[folder]).text_to_image
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


# -------------------------------------------------------------------------------------------------------- contents


STATE_PARTS = {"average.": "moving average (EMA)", "decoder.": "UNet's decoder"}  # as PARTS, beside a run's ControlNet


@dataclass(frozen=True)
class Contents:
    """What a file holds, from its headers alone: for programs that show it."""

    kind: str  # "base", "ControlNet", "base with a ControlNet", or a word for what it is
    layout: Layout | None
    family: str | None  # "SD 1.x" or "SD 2.x"
    base: BaseFile | None
    control: ControlFile | None
    parameters: dict[str, int]  # floating-point numbers by part
    dtypes: dict[str, int]  # floating-point numbers by type
    ema: bool
    problem: str | None  # why a base or a ControlNet that is there cannot be used


def contents(checkpoint: Checkpoint, preset: Config | None = None) -> Contents:
    """`preset` as `find` knows it by the file's name.

    Never raises for a file that could be opened: what is no model is described as `kind`.
    """
    base, bad_base = attempt(identify, checkpoint, None, False, preset)
    control, bad_control = attempt(recognise_control, checkpoint)
    names = [name for name, found in (("base", base), ("ControlNet", control)) if found]
    parameters, dtypes = Counter(), Counter()
    parts = PARTS | STATE_PARTS if control and control.layout == "state" else PARTS
    for key, tensor in checkpoint.tensors.items():
        if tensor.dtype.is_floating_point and key not in IGNORED:
            start = next((start for start in parts if key.startswith(start)), None)
            parameters[parts.get(start, "ControlNet" if control and not base else "other")] += tensor.numel
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    widths = context_widths(checkpoint)
    what, problem = " with a ".join(names) or kind(checkpoint), None
    if not names and is_base(checkpoint):  # what is wrong is in what it says of itself
        what, problem = "base", bad_base
    elif not names and what == CONTROL:
        what, problem = "ControlNet", bad_control
    return Contents(
        what,
        (base or control).layout if names else None,
        FAMILIES.get(widths[0]) if widths else None,
        base,
        control,
        dict(parameters),
        dict(dtypes),
        checkpoint.any_key("model_ema."),
        problem,
    )


def attempt(function, *arguments):
    """-> what the function returns, or None, and why it does not."""
    try:
        return function(*arguments), None
    except CheckpointError as error:
        return None, str(error)
