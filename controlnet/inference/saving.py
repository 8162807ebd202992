"""Where images go: a place that can be written to, and a number that no other run takes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from controlnet.common.images import save_png, to_uint8
from controlnet.common.program import free_place
from controlnet.guidance import Control
from ldm.checkpoints.files import temporary_folder


def is_file_name(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def check_out(out: Path) -> None:
    """Raises ValueError for a place where no image can be saved, before time is spent on it."""
    other_formats = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    if out.suffix.lower() in other_formats or (is_file_name(out) and out.is_dir()):
        raise ValueError(f'--out is "{out}", expected a folder or the name of a file ending in .png')
    place = free_place(out.parent if is_file_name(out) else out)
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = "cannot be written to" if place.is_dir() else "is a file, not a folder"
        raise ValueError(f'--out is "{out}", but "{place}" {what}: give another folder, or a name ending in .png')


def save_image(image: Image.Image, out: Path, i: int, count: int, texts: dict[str, str]) -> Path:
    """Saves image i of `count`, whole or not at all, and returns its path: in a folder under the next free number, else
    under the name given, with i in it if there are several, and a note if a file is replaced.

    Raises ValueError if it cannot be written.
    """
    with saving(out):
        if not is_file_name(out):
            return save_numbered(image, out, texts)
        path = out if count == 1 else out.with_name(f"{out.stem}-{i + 1}{out.suffix}")
        save_named(image, path, texts)
        return path


def save_named(image: Image.Image, path: Path, texts: dict[str, str]) -> None:
    """With a note if a file is replaced."""
    if path.exists():
        tqdm.write(f"{path} is replaced", file=sys.stderr)
    save_png(image, path, texts)


@contextmanager
def saving(out: Path) -> Iterator[None]:
    """Raises ValueError for what cannot be written inside."""
    try:
        yield
    except OSError as error:
        found = error.strerror or error
        raise ValueError(
            f'no image can be saved as "{out}" ({found}): make room there, or give another --out'
        ) from error


def save_numbered(image: Image.Image, folder: Path, texts: dict[str, str]) -> Path:
    """Under the next free number, which goes to the first of several processes that save here at the same time."""
    with temporary_folder(folder / "image.png") as temporary:
        save_png(image, temporary / "image.png", texts)
        number = next_number(folder)
        while True:
            path = folder / f"{number:04d}.png"
            try:
                claim(temporary / "image.png", path)
                return path
            except FileExistsError:
                number += 1


def claim(file: Path, path: Path) -> None:
    """Gives a file its name. Raises FileExistsError if there is one of that name, even one made a moment ago."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # some file systems have no links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(file, path)


def next_number(folder: Path) -> int:
    """After the highest of the images and of the hints that --save-hint has put beside them (0001-hint.png)."""
    stems = (path.stem.partition("-hint")[0] for path in folder.glob("*.png"))
    return max((int(stem) for stem in stems if stem.isdecimal()), default=0) + 1


def save_hints(controls: tuple[Control, ...], image: Path) -> None:
    """As the model sees them: 0001-hint.png for 0001.png, with more than one hint 0001-hint-1.png and so on."""
    for i, control in enumerate(controls):
        path = image.with_name(f"{image.stem}-hint{f'-{i + 1}' if len(controls) > 1 else ''}.png")
        hint = control.hint[0]  # of four channels the last is the opacity, of other numbers some are shown
        hint = hint if len(hint) == 4 else hint[:3] if len(hint) > 2 else hint[:1].expand(3, -1, -1)
        save_named(Image.fromarray(to_uint8(hint)), path, {})
        tqdm.write(f"the hint is saved as {path}", file=sys.stderr)
