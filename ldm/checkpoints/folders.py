"""Folders: a pipeline or a component in diffusers' layout, and what trainers save in between."""

import re
import warnings
from pathlib import Path

from .published import FILE_SUFFIXES
from .read import read_config, read_json, read_tensors
from .spellings import respelled
from .stored import CheckpointError, StoredTensor, first_few

COMPONENTS = ("unet", "vae", "text_encoder", "controlnet")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
WEIGHT_FILE_NAME = re.compile(
    rf"(?P<stem>{'|'.join(STEMS)})(\.(?P<of_file>[\w-]+))?\.(?P<type>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<of_index>[\w-]+))?\.json)?"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}")  # named in an index
# The widest types first, and the moving average before the plain weights of the same type.
VARIANTS = ("", "fp32", "non_ema", "bf16", "fp16")
DEEPSPEED = ("mp_rank_00_model_states.pt", "pytorch_model/mp_rank_00_model_states.pt")


def read_folder(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str], dict[str, dict]]:
    """-> the tensors, the metadata, and diffusers' configurations, as a `Checkpoint` has them.

    In a pipeline each key begins with the name of its component ("unet.", "vae." ...), in a component alone with
    nothing. Raises CheckpointError for a folder without weights.
    """
    folders = {name: path / name for name in COMPONENTS if (path / name).is_dir()}
    if not folders and weight_file(path):
        folders = {"": path}
    tensors, metadata = {}, {}
    for name, folder in folders.items():
        found, described = read_component(folder)
        tensors |= respelled(found, f"{name}." if name else "", path)
        metadata = described | metadata  # the UNet's, which is first and describes the whole base, counts
    if not tensors:
        raise no_weights(path)
    files = {name: folder / "config.json" for name, folder in folders.items()}
    files |= {"scheduler": path / "scheduler" / "scheduler_config.json", "pipeline": path / "model_index.json"}
    configs = {name: read_config(file) for name, file in files.items() if file.is_file()}
    return tensors, metadata, configs


def no_weights(path: Path) -> CheckpointError:
    files = sorted(file.name for file in path.iterdir() if file.suffix in FILE_SUFFIXES)
    advice = f"give one of its files ({first_few(files)})" if files else "give a checkpoint, or a folder with one"
    if (path / "snapshots").is_dir():  # the cache of Hugging Face
        advice = "give one of the folders in its snapshots/"
    return CheckpointError(
        f'"{path}" is a folder without unet/, vae/ and text_encoder/ in diffusers\' layout: {advice}'
    )


def is_model(folder: Path) -> bool:
    """Whether `read_folder` may find weights in it."""
    return any((folder / name).is_dir() for name in COMPONENTS) or weight_file(folder) is not None


def weight_file(folder: Path) -> Path | None:
    """The file with a component's weights, or the index of the files that they are spread over.

    Safetensors come before pickles, then full precision before half, then one file before several.
    """
    found = []
    for file in folder.iterdir():
        match = WEIGHT_FILE_NAME.fullmatch(file.name)
        if match and file.is_file() and not SHARD.search(file.name):
            variant = match["of_file"] or match["of_index"] or ""
            rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
            found.append((match["type"] == "bin", rank, bool(match["index"]), STEMS.index(match["stem"]), file.name))
    if found:
        return folder / min(found)[-1]
    return next((folder / name for name in DEEPSPEED if (folder / name).is_file()), None)


def read_component(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    file = weight_file(folder)
    if file is None:
        raise CheckpointError(
            f'"{folder}" holds no weights: expected {STEMS[0]}.safetensors or the like, download the folder again'
        )
    if file.suffix != ".json":
        if (index := file.with_name(f"{file.name}.index.json")).is_file():
            warnings.warn(f'"{folder}" holds both {file.name} and {index.name}: the former is read', stacklevel=2)
        return read_tensors(file)
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) and Path(n).name == n for n in places.values()):
        raise CheckpointError(f'"{file}" does not say which tensor is in which file: download it again')
    shards = {name: read_tensors(folder / name) for name in sorted(set(places.values()))}
    lost = [key for key, name in places.items() if key not in shards[name][0]]
    if lost:
        raise CheckpointError(f'"{file}" lists tensors that its files lack ({first_few(lost)}): download them again')
    metadata = {key: value for _, described in shards.values() for key, value in described.items()}
    return {key: shards[name][0][key] for key, name in places.items()}, metadata
