"""What a saved image says about itself, as PNG text: the options that make it again, and A1111's "parameters".

`settings` are the options of infer.py as JSON: strings, numbers and lists of them. Their "files" holds a fingerprint of
each file that was used, by the name that was given.
"""

import hashlib
import json
from pathlib import Path

from PIL import Image

from controlnet.common.files import parse_json

from .a1111 import parameters

KEY, A1111_KEY = "controlnet", "parameters"
LARGEST_TEXT = 1_000_000  # characters


def png_texts(settings: dict) -> dict[str, str]:
    return {A1111_KEY: parameters(settings), KEY: json.dumps(settings, ensure_ascii=False)}


def read_texts(path: str | Path) -> tuple[dict | None, str | None]:
    """-> what infer.py recorded in an image, and A1111's text, each None if it is not there.

    Raises ValueError for a file that is not a PNG, and for a text that infer.py does not write.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts = {key: image.info[key] for key in (KEY, A1111_KEY) if isinstance(image.info.get(key), str)}
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f'"{path}" is not readable as an image ({error}): give a PNG that infer.py made') from error
    if any(len(text) > LARGEST_TEXT for text in texts.values()):
        raise ValueError(f'"{path}" has a text of more than {LARGEST_TEXT} characters: give a PNG that infer.py made')
    try:
        settings = parse_json(texts[KEY]) if KEY in texts else None
        if KEY in texts and not isinstance(settings, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise ValueError(f'"{path}" does not say how it was made ({error}): give a PNG that infer.py made') from error
    return settings, texts.get(A1111_KEY)


# ---------------------------------------------------------------------------------------------------- files


def fingerprint(path: str | Path) -> str:
    """A hash of a file's size and its first and last 16 MB, which takes no time even for a base of 4 GB; for a folder a
    hash of all files in it."""
    path, part = Path(path), 16 * 2**20
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(part))
            stream.seek(max(stream.tell(), size - part))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def check_unchanged(found: dict[str, str], recorded: dict[str, str]) -> None:
    """Raises ValueError if a file's fingerprint is not the one that was recorded under its name."""
    for name, value in found.items():
        if recorded.get(name, value) != value:
            raise ValueError(
                f'"{name}" is no longer the file that the image was made with: give that one by its option, or leave '
                "--again out"
            )
