"""Checkpoint files: open them without reading them, recognise what they hold, load them strictly, save them whole.

Files are safetensors with the keys of the released checkpoints (see key_maps.py). Those that we save carry their
architecture as JSON in the metadata; others are recognised by their shapes. Every error that a file can cause is a
`CheckpointError` of one sentence.
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import SD15, SD21, SD21_BASE, Config, ControlConfig, dataclass_from_dict
from .key_maps import KeyMap, Source, names_by_key

# Keys that a file may have and we never read: the schedule's buffers follow from formulas.
IGNORED = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "logvar",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    }
)
IGNORED_BESIDE_BASE = ("model_ema.", "control_model.")  # the latter: a file of a base with its ControlNet
IGNORED_BESIDE_CONTROL = ("model.", "model_ema.", "first_stage_model.", "cond_stage_model.")

# The width of the prompt's context, by which the families differ.
CONTEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FAMILIES = {SD15.unet.context_width: "SD 1.x", SD21.unet.context_width: "SD 2.x"}

# What a file is that is not what was asked for, by the beginning of any of its keys.
KINDS = (
    ("conditioner.embedders.", "an SDXL checkpoint, and only SD 1.x and 2.x are supported"),
    ("model.diffusion_model.joint_blocks.", "an SD 3 checkpoint, and only SD 1.x and 2.x are supported"),
    ("lora_", "a LoRA: give the whole checkpoint that it was merged into"),
    ("control_model.", "a ControlNet: pass it as --control"),
    ("input_hint_block.", "a ControlNet: pass it as --control"),
    ("controlnet_cond_embedding.", "a ControlNet in diffusers' layout: give the file in the original layout"),
    ("down_blocks.", "a UNet in diffusers' layout: give the one file that holds the whole model"),
)
KINDS_BUT_CONTROL = (*KINDS, ("model.diffusion_model.", "a base model without one: pass it as --base"))

# What a file is that is not safetensors, by its first bytes.
FORMATS = (
    (b"PK\x03\x04", "a PyTorch pickle (.ckpt, .pt, .pth): convert it to safetensors first"),
    (b"version https://git-lfs", "the pointer that git leaves in place of a large file: fetch it with `git lfs pull`"),
    (b"<", "a web page: the download went wrong, repeat it"),
)

PARTS = {
    "model.diffusion_model.": "UNet",
    "first_stage_model.": "autoencoder",
    "cond_stage_model.": "text encoder",
}


class CheckpointError(ValueError):
    """A file that cannot be used: one sentence with what was found, what was expected and what to do."""


# ------------------------------------------------------------------------------------------------------------ open


@dataclass(frozen=True)
class Checkpoint:
    """An open safetensors file. Only the header has been read."""

    path: Path
    file: safe_open
    keys: frozenset[str]
    metadata: dict[str, str]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(key).get_shape())

    def tensor(self, source: Source, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of the mapped file where dtype and device allow it, which costs no memory of its own; else a copy."""
        tensor = rows_of(self.file.get_tensor(source.key), source)
        if tensor.dtype == dtype and device.type == "cpu":
            return tensor
        # Pages read through the shared mapping stay with the process as long as the file is open, so a tensor that is
        # converted is read through a mapping of its own: a whole file never stands in memory twice.
        with safe_open(self.path, "pt") as file:
            return rows_of(file.get_tensor(source.key), source).to(device, dtype)

    def any_key(self, start: str) -> bool:
        return any(key.startswith(start) for key in self.keys)


def rows_of(tensor: Tensor, source: Source) -> Tensor:
    return tensor if source.rows is None else tensor[slice(*source.rows)]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Raises CheckpointError if there is no such file, or if it is not safetensors or incomplete."""
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f'"{path}" {found}: give the path of a .safetensors file')
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise CheckpointError(f'"{path}" is not readable as safetensors: {reason_unreadable(path)}') from error
    return Checkpoint(path, file, frozenset(file.keys()), file.metadata() or {})


def reason_unreadable(path: Path) -> str:
    """Safetensors begins with the length of its header (8 bytes, little-endian) and the header, a JSON object."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(32)
    for magic, what in FORMATS:
        if start.startswith(magic):
            return f"it is {what}"
    if start[8:9] == b"{" or size < 9:
        return f"the file of {size} bytes is incomplete or damaged, download or copy it again"
    return "it is another kind of file, expected a checkpoint in the .safetensors format"


# ------------------------------------------------------------------------------------------------------- recognise


def recognise(checkpoint: Checkpoint, prediction: str | None = None) -> Config:
    """The architecture of a base model, from our metadata if it is there, else from the context's width.

    `prediction` ("eps", "v" or "x0") overrides what the file says. Nothing in a released SD 2.x file tells whether it
    predicts eps (the "base" models, 512x512) or v (768x768): without `prediction` v is assumed, with a warning.
    Raises CheckpointError if the file is no SD 1.x or 2.x model.
    """
    if not checkpoint.any_key("model.diffusion_model."):
        raise not_a_base(checkpoint)
    described = described_config(checkpoint)
    if described is not None:
        with metadata_errors(checkpoint):
            config = Config.from_dict(described)
    else:
        config = config_by_shape(checkpoint, prediction)
    if prediction is None:
        return config
    return replace(config, schedule=replace(config.schedule, prediction=prediction))


def config_by_shape(checkpoint: Checkpoint, prediction: str | None) -> Config:
    if CONTEXT_KEY not in checkpoint.keys:
        raise not_a_base(checkpoint)
    width = checkpoint.shape(CONTEXT_KEY)[-1]
    if width == SD15.unet.context_width:
        return SD15
    if width == SD21.unet.context_width:
        if prediction is None:
            warnings.warn(
                f'"{checkpoint.path}" is an SD 2.x model that may predict v (768x768) or eps (the 512x512 "base"), '
                'assuming v: say --prediction eps (prediction="eps" in Python) if its pictures are noise',
                stacklevel=4,
            )
        return SD21_BASE if prediction == "eps" else SD21
    raise CheckpointError(
        f'"{checkpoint.path}" has a context of width {width} and no architecture in its metadata: '
        f"expected {' or '.join(f'{w} ({name})' for w, name in FAMILIES.items())}"
    )


def recognise_control(checkpoint: Checkpoint) -> tuple[str, ControlConfig]:
    """What the keys of a ControlNet in this file begin with ("control_model.", which some programs drop), and its
    configuration, the published one unless our metadata say otherwise.

    Raises CheckpointError if there is no ControlNet in it.
    """
    prefix = next((p for p in ("control_model.", "") if checkpoint.any_key(f"{p}input_hint_block.")), None)
    if prefix is None:
        raise CheckpointError(f'"{checkpoint.path}" holds no ControlNet: it is {kind(checkpoint, KINDS_BUT_CONTROL)}')
    described = described_config(checkpoint) or {}
    with metadata_errors(checkpoint):
        return prefix, dataclass_from_dict(ControlConfig, described.get("control", {}))


def described_config(checkpoint: Checkpoint) -> dict | None:
    """The architecture as we write it into the metadata, None in files of others."""
    with metadata_errors(checkpoint):
        return json.loads(checkpoint.metadata.get("config", "null"))


@contextmanager
def metadata_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f'"{checkpoint.path}" describes its architecture in a way that this version does not know ({error}): '
            "use the version that wrote it"
        ) from error


def not_a_base(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(f'"{checkpoint.path}" is not a base model of SD 1.x or 2.x: it is {kind(checkpoint, KINDS)}')


def kind(checkpoint: Checkpoint, kinds: tuple[tuple[str, str], ...]) -> str:
    """What a file seems to be that is not what was expected, by one of the tables above."""
    for start, what in kinds:
        if checkpoint.any_key(start):
            return what
    keys = f"{counted(len(checkpoint.keys), 'key')}: {first_few(sorted(checkpoint.keys))}"
    return f"something unknown ({keys}), expected keys of the original layout"


# ------------------------------------------------------------------------------------------------------------ load


def load_parts(
    checkpoint: Checkpoint,
    parts: Sequence[tuple[nn.Module, KeyMap]],
    ignored: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Fill modules that were built on the meta device. Nothing is loaded unless everything fits.

    Tensors are assigned one by one: at its peak this needs the parameters' final memory and one tensor more.
    Raises CheckpointError for keys that are missing, of another shape, or unexpected, that is neither wanted nor in
    `IGNORED` nor beginning with any of `ignored`.
    """
    check_keys(checkpoint, wanted_shapes(parts), ignored)
    for module, key_map in parts:
        sources = key_map.sources(module.state_dict())
        state = {name: checkpoint.tensor(source, dtype, torch.device(device)) for name, source in sources.items()}
        module.load_state_dict(state, assign=True)


def wanted_shapes(parts: Sequence[tuple[nn.Module, KeyMap]]) -> dict[str, tuple[int, ...]]:
    """Each key that the modules need -> the shape of the whole tensor in the file."""
    shapes = {}
    for module, key_map in parts:
        state = module.state_dict()
        sources = key_map.sources(state)
        for key, names in names_by_key(sources).items():
            shape = tuple(state[names[0]].shape)
            # The last name's rows are the last of the tensor.
            last_rows = sources[names[-1]].rows
            shapes[key] = shape if last_rows is None else (last_rows[1], *shape[1:])
    return shapes


def check_keys(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]], ignored: tuple[str, ...]) -> None:
    found = {key: checkpoint.shape(key) for key in checkpoint.keys & wanted.keys()}
    missing = wanted.keys() - found.keys()
    extra = {key for key in checkpoint.keys - wanted.keys() - IGNORED if not key.startswith(ignored)}
    misshapen = [key for key, shape in found.items() if shape != wanted[key]]
    if not missing and not extra and not misshapen:
        return
    shapes = (f"{key} is {list(found[key])}, expected {list(wanted[key])}" for key in sorted(misshapen))
    problems = [
        f"{counted(len(lines), 'key')} {what} ({first_few(lines)})"
        for what, lines in (("missing", sorted(missing)), ("unexpected", sorted(extra)), ("misshapen", list(shapes)))
        if lines
    ]
    cause = likely_cause(found, wanted, missing)
    raise CheckpointError(f'"{checkpoint.path}" does not fit, {cause}: {"; ".join(problems)}')


def likely_cause(found: dict[str, tuple], wanted: dict[str, tuple], missing: set[str]) -> str:
    """The best guess at why a file does not fit. `found` and `wanted` are shapes by key."""
    for key, shape in found.items():
        if key.endswith("attn2.to_k.weight") and shape[-1] != wanted[key][-1]:
            return f"it is {made_for(shape[-1])}, expected {made_for(wanted[key][-1])}"
        if key.endswith("input_blocks.0.0.weight") and shape[1:2] == (9,) != wanted[key][1:2]:
            return "it is an inpainting model with 9 input channels, expected a text-to-image model with 4"
    for prefix, part in PARTS.items():
        keys = {key for key in wanted if key.startswith(prefix)}
        if keys and keys <= missing:
            return f"it has no {part} (or another one), expected a whole checkpoint"
    return "it is damaged, or made for another architecture"


def made_for(context_width: int) -> str:
    return f"{FAMILIES.get(context_width, 'a model')} (context width {context_width})"


def first_few(lines: Iterable[str], count: int = 3) -> str:
    lines = list(lines)
    return ", ".join(lines[:count]) + (", ..." if len(lines) > count else "")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# ------------------------------------------------------------------------------------------------------------ save


def gather(module: nn.Module, key_map: KeyMap, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's tensors by the keys of a file, what the file keeps in one tensor joined. `dtype` None keeps theirs."""
    state = module.state_dict()
    tensors = {}
    for key, names in names_by_key(key_map.sources(state)).items():
        tensor = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        tensors[key] = tensor.to(dtype or tensor.dtype)
    return tensors


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors under a temporary name in the same folder, then rename: `path` is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as for any new file; safetensors' own are readable by their owner alone
        # Other programs look for "format" before they read a file.
        save_file(tensors, temporary, {"format": "pt", **metadata})
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
