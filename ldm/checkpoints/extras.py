"""LoRAs and embeddings are found by path, or by name in `weights/` and in their own folders there."""

import math
import os
from itertools import chain
from pathlib import Path

from . import published
from .published import as_path, places_of
from .stored import CheckpointError

LORAS, EMBEDDINGS = "loras", "embeddings"  # the folders in weights/


def find_extra(name: str, folder: str) -> Path | None:
    """The file called `name`, with its suffix or without, in weights/ or in `folder` there, and nowhere else."""
    if os.path.basename(name) != name or "\0" in name:
        return None
    paths = chain.from_iterable(places_of(name, place) for place in (published.WEIGHTS, published.WEIGHTS / folder))
    return next(filter(os.path.isfile, paths), None)


def given_extra(name: str, folder: str, what: str) -> Path:
    """The file that an option names: a path, or a name as above. Raises CheckpointError if there is none."""
    path = as_path(name)
    found = path if path.exists() else find_extra(name, folder)
    if found is None:
        raise no_extra(name, folder, what)
    return found


def no_extra(name: str, folder: str, what: str) -> CheckpointError:
    return CheckpointError(
        f'there is no {what} "{name}", neither as a file nor in weights/ or weights/{folder}/: put it there, or give '
        "its path"
    )


def split_strength(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH -> the file, and the strength or 1. If a file has the whole name, that is meant.

    Raises ValueError for a strength that is not finite.
    """
    name, colon, end = text.rpartition(":")
    try:
        strength = float(end)
    except ValueError:  # a Windows path has a colon, too
        return text, 1.0
    if not colon or not name or os.path.exists(text):
        return text, 1.0
    if not math.isfinite(strength):
        raise ValueError(f'the LoRA "{name}" has the strength {end}, expected a finite number such as 0.8')
    return name, strength
