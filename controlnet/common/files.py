"""Reads other people's files of JSON and of arrays, within limits. Nothing here imports PyTorch.

Whatever they hold, there is a result or a ValueError of one sentence, within seconds and a gigabyte of memory.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

LARGEST_JSON = 10_000_000  # bytes
DEEPEST_JSON = 100  # lists and objects within each other
LARGEST_ARRAY = 400_000_000  # bytes, of all arrays in an .npz file together


def read_json(path: str | Path) -> Any:
    """Raises ValueError as `parse_json` does and for a large file, OSError for one that is not there."""
    size = Path(path).stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"it has {size} bytes, expected at most {LARGEST_JSON}")
    return parse_json(Path(path).read_text(encoding="utf-8-sig"))


def parse_json(text: str) -> Any:
    """Raises ValueError for what is not JSON, and if it is nested so deeply that a walk through it could exhaust
    Python's stack."""
    try:
        value = json.loads(text)
        too_deep = depth(value) > DEEPEST_JSON
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"it is JSON nested deeper than {DEEPEST_JSON} levels")
    return value


def depth(value: Any) -> int:
    """How many lists and objects lie within each other."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, or that of an .npy file under "". Raises ValueError for a file that is not
    readable, or larger than `LARGEST_ARRAY` when unpacked."""
    try:
        size = Path(path).stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(record.file_size for record in archive.infolist())
        if size > LARGEST_ARRAY:
            raise ValueError(f"it has {size} bytes when unpacked, expected at most {LARGEST_ARRAY}")
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return dict(loaded)
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f'"{path}" is not readable as an array ({error}): give a .npy or .npz file') from error
