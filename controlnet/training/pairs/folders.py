"""Data sets without a table, where what belongs together has the same name:

- parallel folders: images/ hints/ captions/ by any of the usual names, nested in either way;
- images with captions beside them (0.png 0.txt), and perhaps hints (0_hint.png);
- sd-scripts': train/10_name/ for images and captions, which an epoch shows ten times, and a folder of hints;
- photographs alone.
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .entries import BadSample, Entry, Listing, Wanted, counted
from .names import ARRAYS, HIDDEN, PICTURES, TEXTS, composed, role_of
from .text import read_text

HELD_OUT = {"test", "val", "valid", "validation", "eval"}  # beside train/
REPEATED = re.compile(r"([1-9]\d{0,2})_")  # sd-scripts' folders, from the start of their name


@dataclass
class Files:
    """Files of one role by their key: the path without the role's folder and without suffix."""

    by_key: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    by_name: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    left: set[Path] = field(default_factory=set)  # that no image has taken

    def add(self, key: Path, file: Path) -> None:
        self.by_key[composed(key)].append(file)
        self.by_name[composed(key.name)].append(file)
        self.left.add(file)

    def take(self, key: Path, alone: bool) -> list[Path]:
        """The files that belong to an image. If no other has its name (`alone`), they may lie in another subfolder."""
        found = self.by_key.get(composed(key)) or (self.by_name.get(composed(key.name)) if alone else None) or []
        self.left.difference_update(found)
        return found


def list_folders(folder: Path, wanted: Wanted) -> Listing | None:
    """The pairs of a folder without a table; None if there is no picture in it. Raises ValueError if hints are wanted
    and there is none at all."""
    not_for_training = held_out(folder)
    files = [file for file in sorted(visible_files(folder)) if file.parts[0] not in not_for_training]
    keys, hints, captions, others = sort_by_role(files)
    if not keys:
        return None
    if wanted.hints and not hints.by_key:
        raise ValueError(f'"{folder}" holds {len(keys)} images and no hints: {wanted.without_hints}')
    names, repeats = Counter(composed(key.name) for key in keys.values()), repeats_of(list(keys))
    listing = Listing(layout_of(files, repeats), left_out=[f"{name}/" for name in not_for_training])
    for image, key in keys.items():
        alone = names[composed(key.name)] == 1
        own = hints.take(key, alone) if wanted.hints else []
        texts = captions.take(key, alone) or captions.take(key.with_name(image.name), alone)  # 0.png.txt
        try:
            hint = folder / the_hint(folder / image, own) if wanted.hints else None
            caption = wanted.caption(*text_of(folder, image, texts, wanted))
        except BadSample as error:
            listing.problems.append(str(error))
        else:
            listing.entries.append(Entry(folder / image, hint, caption, repeats[image]))
    listing.left_out.extend(counted(f"hints {'without an image' if wanted.hints else 'that are there'}", hints.left))
    listing.left_out.extend(counted("captions without an image", captions.left) + counted("other files", others))
    return listing


def held_out(folder: Path) -> list[str]:
    """The parts of a data set that are not for training."""
    if not (folder / "train").is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name.lower() in HELD_OUT)


def visible_files(folder: Path) -> Iterator[Path]:
    """All below `folder`, and below links in it, relative to it. The folder of a training run counts as one file: the
    pictures in it would change what the next run trains on, and this one when it is resumed. Raises ValueError for a
    folder that cannot be read."""
    seen = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if Path(root) != folder and "settings.json" in names and "state" in folders:
            folders[:] = []
            yield Path(root).relative_to(folder)
            continue
        seen.add(os.path.realpath(root))
        folders[:] = [
            name
            for name in folders
            if not HIDDEN.match(name) and os.path.realpath(os.path.join(root, name)) not in seen
        ]
        for name in names:
            if not HIDDEN.match(name):
                yield Path(root, name).relative_to(folder)


def refuse(error: OSError) -> None:
    if isinstance(error, NotADirectoryError):  # an archive, which another layout reads
        return
    raise ValueError(
        f'the folder "{error.filename}" cannot be read ({error.strerror}): make it readable, or move it away'
    ) from error


def sort_by_role(files: list[Path]) -> tuple[dict[Path, Path], Files, Files, list[Path]]:
    """-> the images' keys, the hints, the captions, and all other files."""
    in_folders, elsewhere, hints, captions, others = {}, {}, Files(), Files(), []
    for file in files:
        suffix, (role, key) = file.suffix.lower(), role_and_key(file)
        if suffix in TEXTS and role != "hint":
            captions.add(key, file)
        elif suffix in PICTURES | ARRAYS and role == "hint":
            hints.add(key, file)
        elif suffix in PICTURES and role != "caption":
            (in_folders if role == "image" else elsewhere)[file] = key
        else:
            others.append(file)
    keys = in_folders or elsewhere  # beside images/ a picture is something else, like a preview
    others += elsewhere if in_folders else []
    sort_by_end(keys, hints)
    return keys, hints, captions, others


def sort_by_end(keys: dict[Path, Path], hints: Files) -> None:
    """0_hint.png or 0.canny.png is a hint if there is a 0.png or 0_image.png, which loses its end."""
    ends = {}  # file -> the role that its end names, and the key without that end
    for file, key in keys.items():
        if match := re.fullmatch(r"(.+)[._-]([a-zA-Z]+)", key.name):
            ends[file] = role_of(match[2]), key.with_name(match[1])
    images = {*keys.values(), *(key for role, key in ends.values() if role == "image")}
    for file, (role, key) in ends.items():
        if role == "hint" and key in images:
            hints.add(key, file)
            del keys[file]
    for file, (role, key) in ends.items():
        if role == "image" and composed(key) in hints.by_key:
            keys[file] = key


def role_and_key(file: Path) -> tuple[str | None, Path]:
    """ "birds/hints/sub/0.png" -> "hint", "birds/sub/0": the outermost folder that names a role is taken out."""
    for i, part in enumerate(file.parts[:-1]):
        if role := role_of(part):
            return role, Path(*file.parts[:i], *file.parts[i + 1 :]).with_suffix("")
    return None, file.with_suffix("")


def the_hint(image: Path, found: list[Path]) -> Path:
    """Raises BadSample unless there is exactly one."""
    if not found:
        raise BadSample(f"{image} has no hint: expected an image of its name in hints/")
    if len(found) > 1:
        raise BadSample(f"{image} has two hints, {found[0]} and {found[1]}: move one of them away")
    return found[0]


def text_of(folder: Path, image: Path, found: list[Path], wanted: Wanted) -> tuple[str, str]:
    """-> a caption, and what to say where it is missing. Raises BadSample for an encoding that is not read."""
    found = sorted(found, key=lambda file: (role_and_key(file)[0] != "caption", file.suffix != ".txt"))
    if not found or wanted.prompt is not None:
        return "", f"{folder / image} has no caption: expected {image.stem}.txt beside it or in captions/"
    try:
        return read_text(folder / found[0]), f"{folder / found[0]} is empty, expected a caption"
    except (ValueError, OSError) as error:
        raise BadSample(str(error)) from error


def repeats_of(images: list[Path]) -> dict[Path, int]:
    """How often an epoch shows each: once, unless all lie in folders such as 10_name with different numbers. Only
    their ratios matter."""
    found = {image: next((int(m[1]) for m in map(REPEATED.match, image.parts[:-1]) if m), 0) for image in images}
    divisor = math.gcd(*found.values()) if all(found.values()) else 0
    return {image: number // divisor if divisor else 1 for image, number in found.items()}


def layout_of(files: list[Path], repeats: dict[Path, int]) -> str:
    """The layout in words: the folders that name a role, or what lies beside the images."""
    if any(REPEATED.match(part) for image in repeats for part in image.parts[:-1]):
        most = max(repeats.values())
        return "sd-scripts' folders" + (f", some repeated {most} times" if most > 1 else "")
    roles = sorted({part for file in files for part in file.parts[:-1] if role_of(part)})
    if roles:
        return f"folders {', '.join(f'{name}/' for name in roles)}"
    return "images with captions beside them" if any(file.suffix.lower() in TEXTS for file in files) else "images"
