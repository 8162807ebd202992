"""Checkpoint files: open them without reading them, load them strictly, save them whole.

A checkpoint is a safetensors file, a PyTorch pickle, or a folder in diffusers' layout, with the keys listed in
key_maps.py. What a file is, recognise.py finds out. Every error that a file can cause is a `CheckpointError` of one
sentence.
"""

import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.config import SD15, SD21

from .files import new_file
from .key_maps import KeyMap, Source, names_by_key
from .mapped import CheckpointError, Damaged, MappedFile, Stored, parse_json, read_safetensors
from .pickles import LEGACY_MAGIC, ZIP_MAGIC, Refused, read_pickle

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
        "scale_factor",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "text_encoder.text_model.embeddings.position_ids",
        "difference",  # marks a ControlNet whose copy of the encoder is stored minus the base's
    }
)
BASE_PARTS = ("model.", "first_stage_model.", "cond_stage_model.", "unet.", "vae.", "text_encoder.")
# Beside a base: its ControlNet, in one file or one folder.
IGNORED_BESIDE_BASE = ("model_ema.", "control_model.", "controlnet.")
IGNORED_BESIDE_CONTROL = (*BASE_PARTS, "model_ema.")

# The width of the prompt's context, by which the families differ.
FAMILIES = {SD15.unet.context_width: "SD 1.x", SD21.unet.context_width: "SD 2.x"}

# What a file is that is no checkpoint, by its first bytes.
FORMATS = (
    (b"version https://git-lfs", "the pointer that git leaves in place of a large file: fetch it with `git lfs pull`"),
    (b"<", "a web page: the download went wrong, repeat it"),
    (b"\x80", "a pickle that PyTorch did not write: save its state_dict with torch.save or as safetensors"),
    (b"GGUF", "a GGUF file: get the model as .safetensors"),
)

PARTS = {
    "model.diffusion_model.": "UNet",
    "unet.": "UNet",
    "first_stage_model.": "autoencoder",
    "vae.": "autoencoder",
    "cond_stage_model.": "text encoder",
    "text_encoder.": "text encoder",
    "control_model.": "ControlNet",
    "controlnet.": "ControlNet",
    "model_ema.": "moving average (EMA)",
}


# ------------------------------------------------------------------------------------------------------------ open


@dataclass(frozen=True)
class Checkpoint:
    """An open file or folder. Only its headers have been read."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=dict)
    # Diffusers' configurations: by subfolder ("unet", "scheduler" ...), "" for the file or folder itself.
    configs: dict[str, dict] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        return set(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.tensors[key].shape

    def tensor(self, source: Source, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of the file where dtype and device allow it, which if it is large costs no memory of its own; else a
        copy."""
        rows = slice(None) if source.rows is None else slice(*source.rows)
        return self.tensors[source.key].load(dtype, device, rows)

    def any_key(self, start: str) -> bool:
        return any(key.startswith(start) for key in self.tensors)

    def with_ema(self) -> "Checkpoint":
        """The moving average in place of the UNet's weights. Raises CheckpointError if the file has none.

        It is stored under the UNet's names without their dots: `model_ema.diffusion_modelout2bias`.
        """
        averages = {
            key: self.tensors.get("model_ema." + key.removeprefix("model.").replace(".", ""))
            for key in self.tensors
            if key.startswith("model.diffusion_model.")
        }
        if not averages or None in averages.values():
            raise CheckpointError(f'"{self.path}" has no (complete) moving average of its UNet: load its plain weights')
        return replace(self, tensors={**self.tensors, **averages})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A .safetensors file, a pickle (.ckpt, .pth, .bin) or a folder in diffusers' layout.

    Raises CheckpointError if there is no such file, or if it is of another kind, incomplete, or wants to run code.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return open_folder(path)
        tensors, metadata = read_tensors(path)
        config = path.parent / "config.json"
        alone = any(key.startswith(("down_blocks.", "controlnet_cond_embedding.")) for key in tensors)
        configs = {"": read_json(config)} if alone and config.is_file() else {}
        return Checkpoint(path, renamed(tensors, "", path), metadata, configs)
    except OSError as error:
        raise CheckpointError(f'"{path}" cannot be read ({error.strerror}): give a file that you may read') from error


def read_tensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of one file, and its metadata."""
    if not path.is_file():
        raise CheckpointError(f'"{path}" does not exist: give the path of a checkpoint or of a folder with one')
    file = MappedFile(path)
    try:
        if file.read(0, len(LEGACY_MAGIC)).startswith((ZIP_MAGIC, LEGACY_MAGIC)):
            return read_pickle(file), {}
        return read_safetensors(file)
    except Refused as error:
        raise CheckpointError(
            f'"{path}" is a pickle that asks for {error}, which no checkpoint needs: nothing in it was run, as it may '
            "be malicious; get the model as .safetensors"
        ) from error
    except Damaged as error:
        raise CheckpointError(f'"{path}" is not readable as a checkpoint: {reason_unreadable(file, error)}') from error


def reason_unreadable(file: MappedFile, error: Damaged) -> str:
    """What a file is by its first bytes. Those of safetensors are a length (8 bytes) and a JSON object."""
    start = file.read(0, 32)
    if not start.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        for magic, what in FORMATS:
            if start.startswith(magic) and start[8:9] != b"{":
                return f"it is {what}"
        if start[8:9] != b"{" and file.size > 8:
            return "it is another kind of file, expected a .safetensors, .ckpt, .pth or .bin checkpoint"
    return f"the file of {file.size} bytes is incomplete or damaged, download or copy it again ({error})"


# Older and newer names of the same tensor -> the one in the key maps.
SPELLINGS = (
    # Some programs, and transformers since its version 5, leave out a level of the text model.
    (
        re.compile(r"^(cond_stage_model\.transformer\.|text_encoder\.)(?=embeddings\.|encoder\.|final_layer)"),
        r"\1text_model.",
    ),
    # The autoencoder's attention, as diffusers named it in its first months.
    (re.compile(r"(coder\.mid_block\.attentions\.0\.)query\."), r"\1to_q."),
    (re.compile(r"(coder\.mid_block\.attentions\.0\.)key\."), r"\1to_k."),
    (re.compile(r"(coder\.mid_block\.attentions\.0\.)value\."), r"\1to_v."),
    (re.compile(r"(coder\.mid_block\.attentions\.0\.)proj_attn\."), r"\1to_out.0."),
)


def renamed(tensors: dict[str, Stored], prefix: str, path: Path) -> dict[str, Stored]:
    """With `prefix` in front of every key, and each key in the spelling of the key maps."""
    result = {}
    for key, tensor in tensors.items():
        name = prefix + key
        for pattern, spelling in SPELLINGS:
            name = pattern.sub(spelling, name)
        if name in result:
            raise CheckpointError(f'"{path}" has {name} twice, under two names: make it again from its sources')
        result[name] = tensor
    return result


# ---------------------------------------------------------------------------------------- open: diffusers' folders

COMPONENTS = ("unet", "vae", "text_encoder", "controlnet")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def open_folder(path: Path) -> Checkpoint:
    """A pipeline (subfolders unet, vae ...; their names become the beginnings of the keys), or one component alone."""
    folders = {name: path / name for name in COMPONENTS if (path / name).is_dir()}
    if not folders and weight_files(path):
        folders = {"": path}
    tensors, metadata, configs = {}, {}, {}
    for name, folder in folders.items():
        found, described = read_component(folder)
        tensors |= renamed(found, f"{name}." if name else "", path)
        metadata = described | metadata  # the UNet's, which describe the whole base, before a ControlNet's
    if not tensors:
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".ckpt", ".pth"))
        advice = f"give one of its files ({first_few(files)})" if files else "give a checkpoint, or a folder with one"
        raise CheckpointError(
            f'"{path}" is a folder without unet/, vae/ and text_encoder/ in diffusers\' layout: {advice}'
        )
    for name, folder in {**folders, "scheduler": path / "scheduler"}.items():
        file = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if file.is_file():
            configs[name] = read_json(file)
    return Checkpoint(path, tensors, metadata, configs)


def weight_files(folder: Path) -> list[Path]:
    """The file with a component's weights, or the index of the files that they are spread over; [] if there is none.

    Full precision comes before fp16, and safetensors before pickles.
    """
    names = [
        name
        for suffix in ("safetensors", "bin")
        for variant in ("", ".fp16")
        for stem in STEMS
        for name in (f"{stem}{variant}.{suffix}", f"{stem}.{suffix}.index{variant}.json")
    ]
    return [folder / name for name in names if (folder / name).is_file()][:1]


def read_component(folder: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f'"{folder}" holds no weights: expected {STEMS[0]}.safetensors or the like, download the folder again'
        )
    if files[0].suffix != ".json":
        return read_tensors(files[0])
    places = read_json(files[0]).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) and Path(n).name == n for n in places.values()):
        raise CheckpointError(f'"{files[0]}" does not say which tensor is in which file: download it again')
    shards = {name: read_tensors(folder / name) for name in sorted(set(places.values()))}
    lost = [key for key, name in places.items() if key not in shards[name][0]]
    if lost:
        raise CheckpointError(
            f'"{files[0]}" lists tensors that its files lack ({first_few(lost)}): download them again'
        )
    metadata = {key: value for _, described in shards.values() for key, value in described.items()}
    return {key: shards[name][0][key] for key, name in places.items()}, metadata


def read_json(path: Path) -> dict:
    try:
        return parse_json(path.read_bytes())
    except Damaged as error:
        raise CheckpointError(f'"{path}": {error}, download it again') from error


# ------------------------------------------------------------------------------------------------------------ load


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside are on the meta device: shapes alone, for `load_parts` to fill."""
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    """Numbers that do not exist need no first values; drawing them would cost seconds of imports."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init" or function is Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load_parts(
    checkpoint: Checkpoint,
    parts: Sequence[tuple[nn.Module, KeyMap]],
    ignored: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Fill modules that were built `without_weights`. Nothing is loaded unless everything fits.

    Tensors are assigned one by one: at its peak this needs the parameters' final memory and one tensor more. Parameters
    that no output depends on are zero where the file lacks them. Warns of weights that are not finite.
    Raises CheckpointError for keys that are missing, of another shape, not of a floating type, or unexpected, that is
    neither wanted nor in `IGNORED` nor beginning with any of `ignored`.
    """
    check_keys(checkpoint, parts, ignored)
    device = torch.device(device)
    broken = []
    for module, key_map in parts:
        wanted = module.state_dict()
        sources = key_map.sources(wanted)
        state = {}
        for name, like in wanted.items():
            source = sources.get(name)
            if source is None or source.key not in checkpoint.tensors:
                state[name] = torch.zeros(like.shape, dtype=dtype, device=device)
                continue
            tensor = checkpoint.tensor(source, dtype, device)
            if not is_finite(tensor):
                broken.append(source.key)
            stored = checkpoint.tensors[source.key]
            if stored.is_mapped and stored.dtype == dtype and device.type == "cpu":
                tensor = checkpoint.tensor(source, dtype, device)  # the pages just read leave with the view before
            state[name] = tensor.reshape(like.shape)
        module.load_state_dict(state, assign=True)
    if broken:
        warnings.warn(
            f'"{checkpoint.path}" has NaN or infinite numbers in {counted(len(broken), "tensor")}, the first in '
            f"{broken[0]}: expect black or broken pictures",
            stacklevel=3,
        )


def is_finite(tensor: Tensor) -> bool:
    """Both extremes are, and NaN is taken for one. This needs one pass and no memory."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def wanted_shapes(parts: Sequence[tuple[nn.Module, KeyMap]]) -> dict[str, tuple[int, ...]]:
    """Each key that the modules have a place for -> the shape of the whole tensor in the file."""
    shapes = {}
    for module, key_map in parts:
        state = module.state_dict()
        sources = key_map.sources(state)
        for key, names in names_by_key(sources).items():
            shape, last = tuple(state[names[0]].shape), sources[names[-1]]
            if last.matrix:
                shape = shape[:2]
            # The last name's rows are the last of the tensor.
            shapes[key] = shape if last.rows is None else (last.rows[1], *shape[1:])
    return shapes


def check_keys(checkpoint: Checkpoint, parts: Sequence[tuple[nn.Module, KeyMap]], ignored: tuple[str, ...]) -> None:
    wanted = wanted_shapes(parts)
    found = {key: checkpoint.shape(key) for key in checkpoint.keys & wanted.keys()}
    missing = wanted.keys() - found.keys() - unused_keys(parts)
    extra = {key for key in checkpoint.keys - wanted.keys() - IGNORED if not key.startswith(ignored)}
    misshapen = sorted(key for key, shape in found.items() if as_matrix(shape) != as_matrix(wanted[key]))
    integers = sorted(key for key in found if not checkpoint.tensors[key].dtype.is_floating_point)
    if not missing and not extra and not misshapen and not integers:
        return
    shapes = [f"{key} is {list(found[key])}, expected {list(wanted[key])}" for key in misshapen]
    types = [f"{key} is {checkpoint.tensors[key].dtype}" for key in integers]
    problems = [
        f"{counted(len(lines), 'key')} {what} ({first_few(lines)})"
        for what, lines in (
            ("missing", sorted(missing)),
            ("unexpected", sorted(extra)),
            ("misshapen", shapes),
            ("not of a floating-point type", types),
        )
        if lines
    ]
    cause = likely_cause(found, wanted, missing)
    raise CheckpointError(f'"{checkpoint.path}" does not fit, {cause}: {"; ".join(problems)}')


def unused_keys(parts: Sequence[tuple[nn.Module, KeyMap]]) -> set[str]:
    return {
        source.key
        for module, key_map in parts
        for name, source in key_map.sources(module.state_dict()).items()
        if key_map.unused and name.startswith(key_map.unused)
    }


def as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a linear layer are the same, and files have either."""
    return shape[:2] if shape[2:] == (1, 1) else shape


FIRST_CONVOLUTIONS = ("input_blocks.0.0.weight", "unet.conv_in.weight")


def likely_cause(found: dict[str, tuple], wanted: dict[str, tuple], missing: set[str]) -> str:
    """The best guess at why a file does not fit. `found` and `wanted` are shapes by key."""
    for key, shape in found.items():
        if key.endswith("attn2.to_k.weight") and shape[-1:] != wanted[key][-1:]:
            return f"it is {made_for(shape[-1:])}, expected {made_for(wanted[key][-1:])}"
        if key.endswith(FIRST_CONVOLUTIONS) and len(shape) == 4 and shape[1] != wanted[key][1]:
            use = {5: "a depth", 7: "an upscaling", 9: "an inpainting"}.get(shape[1], "another")
            return f"it is {use} model with {shape[1]} input channels, expected a text-to-image model with 4"
    for prefix, part in PARTS.items():
        keys = {key for key in wanted if key.startswith(prefix)}
        if keys and keys <= missing:
            return f"it has no {part} (or another one), expected a whole checkpoint"
    return "it is damaged, or made for another architecture"


def made_for(context_width: tuple[int, ...]) -> str:
    width = math.prod(context_width)
    return f"{FAMILIES.get(width, 'a model')} (context width {width})"


def first_few(lines: Iterable[str], count: int = 3) -> str:
    """For a sentence: not all of them, and none of them endless."""
    lines = [f"{line[:160]}..." if len(line) > 160 else line for line in lines]
    return ", ".join(lines[:count]) + (", ..." if len(lines) > count else "")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# ------------------------------------------------------------------------------------------------------------ save


def gather(module: nn.Module, key_map: KeyMap, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's tensors by the keys of a file, what the file keeps in one tensor joined. `dtype` None keeps theirs."""
    state = module.state_dict()
    sources = key_map.sources(state)
    tensors = {}
    for key, names in names_by_key(sources).items():
        tensor = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        if sources[names[0]].matrix:
            tensor = tensor.flatten(1)
        tensors[key] = tensor.to(dtype or tensor.dtype)
    return tensors


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors under a temporary name in the same folder, then rename: `path` is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with new_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as for any new file; safetensors' own are readable by their owner alone
        # Other programs look for "format" before they read a file.
        save_file(tensors, temporary, {"format": "pt", **metadata})
        temporary.chmod(mode)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, under a temporary name until all is written: `path` is never half there.

    Raises CheckpointError if `path` exists and is not an empty folder: what is in it might be lost.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f'"{path}" exists: give the name of a new folder')
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a save that was cut off
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
