"""Opens a checkpoint without reading its weights: safetensors, PyTorch's pickles, and folders in diffusers' layout.

Every error that a file can cause is a `CheckpointError` of one sentence.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .key_maps import Source
from .pickles import LEGACY_MAGIC, ZIP_MAGIC, Refused, read_pickle
from .stored import CheckpointError, Damaged, StoredTensor, first_few, parse_json, read_safetensors


@dataclass(frozen=True)
class Checkpoint:
    """An open file or folder. Only its headers have been read."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    # Diffusers' configurations: by subfolder ("unet", "scheduler" ...), "" for the file or folder itself.
    configs: dict[str, dict] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        return set(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.tensors[key].shape

    def tensor(self, source: Source, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of the file where dtype and device allow it, else a copy. A large view takes no memory until used."""
        rows = slice(None) if source.rows is None else slice(*source.rows)
        return self.tensors[source.key].load(dtype, device, rows)

    def any_key(self, start: str) -> bool:
        return any(key.startswith(start) for key in self.tensors)

    def with_ema(self) -> "Checkpoint":
        """With the EMA of the UNet's weights in place of the weights. Raises CheckpointError if the file has none.

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


def read_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, and its metadata."""
    if not path.exists():
        raise CheckpointError(f'"{path}" does not exist: {where_to_find(path)}')
    if not path.is_file():
        raise CheckpointError(f'"{path}" is no file: give the path of a checkpoint or of a folder with one')
    with open(path, "rb") as file:
        start = file.read(32)
    try:
        if start.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
            return read_pickle(path), {}
        return read_safetensors(path)
    except Refused as error:
        raise CheckpointError(f'"{path}" is a pickle that asks for {error}, {error.advice}') from error
    except Damaged as error:
        raise CheckpointError(
            f'"{path}" is not readable as a checkpoint: {reason_unreadable(path, start, error)}'
        ) from error


def where_to_find(path: Path) -> str:
    """The advice for a path that does not exist."""
    if re.match(r"https?:/", str(path)):
        return "it is a URL, so download the file and give its path"
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not path.parent.exists():
        return f"if it is a repository on Hugging Face, `hf download {path} --local-dir FOLDER` and give FOLDER"
    return "give the path of a checkpoint or of a folder with one"


# What a file is that is no checkpoint, by its first bytes.
FORMATS = (
    (rb"version https://git-lfs", "the pointer that git leaves in place of a large file: fetch it with `git lfs pull`"),
    (rb"\s*<", "a web page: the download went wrong, repeat it"),
    (rb"\x80", "a pickle that PyTorch did not write: save its state_dict with torch.save or as safetensors"),
    (rb"GGUF", "a GGUF file: get the model as .safetensors"),
    (rb"\0+\Z", "zeros at its beginning: the download is unfinished, repeat it"),
)
SHORT_TEXT = 1000  # bytes of a server's answer in place of a file


def reason_unreadable(path: Path, start: bytes, error: Damaged) -> str:
    """What a file is by its first bytes. Those of safetensors are a length (8 bytes) and a JSON object."""
    size = path.stat().st_size
    if not start.startswith((ZIP_MAGIC, LEGACY_MAGIC)) and start[8:9] != b"{":
        for pattern, what in FORMATS:
            if re.match(pattern, start):
                return f"it is {what}"
        if 0 < size < SHORT_TEXT and path.read_bytes().isascii():
            text = " ".join(path.read_text().split())
            return f'it is a text ("{text:.200}"), such as a failed download leaves: repeat it'
        if size > 8:
            return "it is another kind of file, expected a .safetensors, .ckpt, .pth or .bin checkpoint"
    return f"the file of {size} bytes is incomplete or damaged, download or copy it again ({error})"


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


def renamed(tensors: dict[str, StoredTensor], prefix: str, path: Path) -> dict[str, StoredTensor]:
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


# --------------------------------------------------------------------------------------------- diffusers' folders

COMPONENTS = ("unet", "vae", "text_encoder", "controlnet")
LARGEST_JSON = 10_000_000  # bytes
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
        metadata = described | metadata  # the UNet's, which describe the whole base, come before all others
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


def read_component(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
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
        if path.stat().st_size > LARGEST_JSON:
            raise Damaged(f"it has {path.stat().st_size} bytes, expected at most {LARGEST_JSON}")
        return parse_json(path.read_bytes())
    except Damaged as error:
        raise CheckpointError(f'"{path}": {error}, download it again') from error
