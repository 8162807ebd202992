"""One file's tensors, or why it has none; and the JSON beside them."""

import re
from pathlib import Path

from .pickles import LEGACY_MAGIC, ZIP_MAGIC, Refused, read_pickle
from .published import where_to_find
from .stored import CheckpointError, Damaged, StoredTensor, parse_json, read_safetensors

LARGEST_JSON = 10_000_000  # bytes


def read_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, and its metadata.

    Raises CheckpointError if there is no such file, or if it is of another kind, incomplete, or wants to run code.
    """
    if not path.exists():
        raise CheckpointError(f'"{path}" does not exist: {where_to_find(path)}')
    if not path.is_file():
        raise CheckpointError(f'"{path}" is not a file: give the path of a checkpoint or of a folder with one')
    with open(path, "rb") as file:
        start = file.read(4096)
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


# What a file is that is not a checkpoint, by its first bytes.
FORMATS = (
    (rb"version https://git-lfs", "the pointer that git leaves in place of a large file: fetch it with `git lfs pull`"),
    (rb"# xet version", "the pointer that git leaves in place of a large file: fetch it with `git xet pull`"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page: the download went wrong, repeat it"),
    (rb"\x80", "a pickle that PyTorch did not write: save its state_dict with torch.save or as safetensors"),
    (rb"(#[^\n]*\n|\s)*model:\s", "a configuration in YAML: give the checkpoint that it is for"),
    (rb'\s*\{.*"(_class_name|weight_map|architectures)"', "a configuration of diffusers: give the folder it is in"),
    (rb"GGUF", "a GGUF file: get the model as .safetensors"),
    (rb"\x89HDF", "a file of Keras: get the model as .safetensors"),
    (rb"7z\xbc\xaf|Rar!|\x1f\x8b|BZh|\xfd7zXZ", "a packed archive: unpack it, and give the checkpoint in it"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", "an image, expected a checkpoint: give the model that it was made with"),
    (rb"\0+\Z", "zeros at its beginning: the download is unfinished, repeat it"),
)
SHORT_TEXT = 5_000  # bytes of a server's answer in place of a file


def reason_unreadable(path: Path, start: bytes, error: Damaged) -> str:
    """What a file is by its first bytes. Those of safetensors are a length (8 bytes) and a JSON object."""
    size, known = path.stat().st_size, start[8:9] == b"{" or start.startswith((ZIP_MAGIC, LEGACY_MAGIC))
    if not known:
        for pattern, what in FORMATS:
            if re.match(pattern, start, re.DOTALL):
                return f"it is {what}"
    if 0 < size < SHORT_TEXT and (text := text_of(path)):
        return f'it is a text ("{text:.200}"), such as a failed download leaves: repeat it'
    if known or size <= 8:
        return f"the file of {size} bytes is incomplete or damaged, download or copy it again ({error})"
    return "it is another kind of file, expected a .safetensors, .ckpt, .pth or .bin checkpoint"


def text_of(path: Path) -> str | None:
    """A file's text on one line; None if it is not text."""
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


def read_json(path: Path) -> dict:
    """A JSON object. Raises CheckpointError for everything else."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise Damaged(f"it has {path.stat().st_size} bytes, expected at most {LARGEST_JSON}")
        return parse_json(path.read_bytes())
    except Damaged as error:
        raise CheckpointError(f'"{path}": {error}, download it again') from error


def read_config(path: Path) -> dict:
    """`read_json` for a configuration of diffusers, without what is null: that stands for a default."""
    return {name: value for name, value in read_json(path).items() if value is not None}
