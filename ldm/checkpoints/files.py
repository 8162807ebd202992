"""Files and folders that are there whole or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFTOVER = re.compile(r"\..+\.\d+\.tmp")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, this process's own, for what becomes `path`. It is removed at the end."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # left by a process of the same number
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write `path` under; it replaces `path` at the end, and only if nothing failed.

    It lies in a folder of its own, and so do the temporary files of whoever writes it.
    """
    with temporary_folder(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


def new_link(path: Path, existing: Path) -> None:
    """`path` becomes another name of a file that nobody writes to again; a copy where the disk has no such names."""
    with new_file(path) as temporary:
        try:
            os.link(existing, temporary)
        except OSError:
            shutil.copyfile(existing, temporary)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder. Raises ValueError if `path` exists and is not an empty folder: its files might be lost."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f'"{path}" exists: give the name of a new folder')
    with temporary_folder(path) as folder:
        yield folder
        os.replace(folder, path)


def remove_leftovers(folder: Path) -> None:
    """What processes that were killed have left in `folder`. No running one may be writing there."""
    for path in folder.glob(".*.tmp"):
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
