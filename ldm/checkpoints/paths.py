"""What a user gives as a checkpoint: a path as it is typed, and what to say where there is nothing."""

import os
import re
from pathlib import Path

from .stored import CheckpointError

FILE_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")  # no repository is called like that
# Addresses of what tools/download.py knows, by its names.
DOWNLOADS = (
    (r"stable-diffusion-inpainting", "sd15-inpainting"),
    (r"stable-diffusion-v1-5", "sd15"),
    (r"stable-diffusion-2-1-base", "sd21-base"),
    (r"stable-diffusion-2-1(?![\w-])", "sd21"),
    (r"control_v11\w+_sd15(?:s2)?_(\w+?)(?:_fp16)?(?!\w)", r"\1"),
)


def as_path(given: str | Path) -> Path:
    """With `~` for the home folder, and with another system's backslashes where only then there is something.

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
