"""Pairs of images and hints on disk. Three layouts are read:

- fill50k's, as published: `prompt.json`, a JSON object a line with `source` (the hint), `target` and `prompt`;
- Hugging Face's imagefolder: `metadata.jsonl`, a line with `file_name`, `conditioning_image` and `text`;
- three parallel folders: images/, hints/, captions/ with files of the same name; captions may lie beside the images.

Sizes are (height, width) in pixels. Arrays are uint8 (H, W, C).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from controlnet.common.image_files import FORMATS, read_image
from controlnet.hints import hint_file

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class BadSample(ValueError):
    """A pair that cannot be trained on: one sentence that names the file or the line."""


@dataclass(frozen=True)
class Entry:
    """Where one pair lies. `hint` is None where hints are made from the images."""

    image: Path
    hint: Path | None
    caption: str


@dataclass(frozen=True)
class Listing:
    """A folder's pairs, and a sentence for each line or file that describes none."""

    entries: list[Entry]
    problems: list[str]


@dataclass(frozen=True)
class Keys:
    """What a layout with a line for each pair calls its parts."""

    image: str
    hint: str
    caption: str


LINES = {
    "prompt.json": Keys("target", "source", "prompt"),
    "metadata.jsonl": Keys("file_name", "conditioning_image", "text"),
}


def list_folder(folder: str | Path, need_hints: bool = True) -> Listing:
    """What a folder holds, by the first layout that fits; no image is opened.

    Without `need_hints` hints are left out, whether there are any or not.
    Raises ValueError if it is no folder, none of the layouts, or empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f'"{folder}" {found}: give a folder of pairs, or the name of a synthetic dataset')
    for name, keys in LINES.items():
        if (folder / name).is_file():
            listing = list_lines(folder / name, keys, need_hints)
            break
    else:
        if not (folder / "images").is_dir():
            expected = f"{', '.join(LINES)} or the folders images/, hints/ and captions/"
            raise ValueError(f'"{folder}" has no layout that is known: expected {expected} in it')
        listing = list_parallel(folder, need_hints)
    if not listing.entries:
        problems = "; ".join(listing.problems[:3]) or "it lists none"
        raise ValueError(f'"{folder}" holds no pair to train on: {problems}')
    return listing


def list_lines(path: Path, keys: Keys, need_hints: bool) -> Listing:
    entries, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entries.append(entry_of_line(path.parent, json.loads(line), keys, need_hints))
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number} is not JSON ({error.msg})")
        except BadSample as error:
            problems.append(f"{path}:{number} {error}")
    return Listing(entries, problems)


def entry_of_line(folder: Path, values: object, keys: Keys, need_hints: bool) -> Entry:
    needed = [keys.image, keys.caption, *([keys.hint] if need_hints else [])]
    missing = [key for key in needed if not isinstance(values, dict) or not isinstance(values.get(key), str)]
    if missing:
        raise BadSample(f'has no text for "{missing[0]}"')
    if not values[keys.caption].strip():
        raise BadSample(f'has an empty caption ("{keys.caption}")')
    return Entry(
        folder / values[keys.image], folder / values[keys.hint] if need_hints else None, values[keys.caption].strip()
    )


def list_parallel(folder: Path, need_hints: bool) -> Listing:
    hints = {path.stem: path for path in (folder / "hints").glob("*") if path.suffix.lower() in {*IMAGES, ".npy"}}
    entries, problems = [], []
    for image in sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in IMAGES):
        captions = (folder / "captions" / f"{image.stem}.txt", image.with_suffix(".txt"))
        caption_file = next((path for path in captions if path.is_file()), None)
        caption = caption_file.read_text(encoding="utf-8", errors="replace").strip() if caption_file else ""
        if not caption_file:
            problems.append(f"{image} has no caption: expected {captions[0]} or {captions[1]}")
        elif not caption:
            problems.append(f"{caption_file} is empty, expected a caption")
        elif need_hints and image.stem not in hints:
            problems.append(f"{image} has no hint: expected an image of its name in {folder / 'hints'}")
        else:
            entries.append(Entry(image, hints[image.stem] if need_hints else None, caption))
    return Listing(entries, problems)


def read_pixels(path: Path) -> np.ndarray:
    """(H, W, 3). Raises BadSample."""
    try:
        return np.array(read_image(path))
    except ValueError as error:
        raise BadSample(str(error)) from error


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of an image, upright, from its header alone. Raises BadSample."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size if turned else image.size[::-1]
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise BadSample(f'"{path}" is not readable as an image ({error})') from error


def check_file(path: Path) -> None:
    """That it is there and, if it is no array, has the header of an image. Raises BadSample."""
    if not path.is_file():
        raise BadSample(f'"{path}" does not exist')
    if path.suffix.lower() != ".npy":
        size_of(path)


def read_hint(path: Path, channels: int) -> np.ndarray:
    """(H, W, `channels`), as controlnet/hints/hint_file.py reads it. Raises BadSample."""
    try:
        return hint_file.read_hint(path, channels)
    except ValueError as error:
        raise BadSample(str(error)) from error


def check_same_shape(image: np.ndarray, hint: np.ndarray, entry: Entry) -> None:
    """A hint may be smaller or larger than its image, but not of another shape: it would lie askew on it."""
    (height, width), (hint_height, hint_width) = image.shape[:2], hint.shape[:2]
    if abs(hint_width * height - hint_height * width) > 0.02 * hint_height * width:
        raise BadSample(
            f'"{entry.hint}" is {hint_width}x{hint_height} and its image "{entry.image}" {width}x{height}, '
            "expected the same shape"
        )
