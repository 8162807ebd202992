"""Tensors that wait in their file until they are needed, and the safetensors format."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class CheckpointError(ValueError):
    """A file that cannot be used: one sentence with what was found, what was expected and what to do."""


class Damaged(Exception):
    """What is wrong in a file, for the sentence of a CheckpointError."""


def first_few(lines: Iterable[str], count: int = 3) -> str:
    """For a sentence: not all of them, and none of them endless."""
    lines = [f"{line[:160]}..." if len(line) > 160 else line for line in lines]
    return ", ".join(lines[:count]) + (", ..." if len(lines) > count else "")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type and shape are known, its numbers are read when they are used."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    view: Callable[[], Tensor]  # the tensor as it is in the file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def load(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None
    ) -> Tensor:
        """All rows, or some: a view of the file where dtype and device allow it, else a copy. A large view takes no
        memory until it is used."""
        tensor = self.view() if rows is None else self.view()[slice(*rows)]
        return tensor.to(device, dtype)


# ----------------------------------------------------------------------------------------------------- safetensors

# Names in the header, from the format's documentation (github.com/huggingface/safetensors).
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 5_000_000  # bytes; a whole base with its EMA has 0.3 million
MIN_MAPPED = 2**17  # bytes; smaller tensors are read, not mapped: mapping one takes as long as reading so many


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """-> the tensors by name, and the metadata. Only the header is read.

    Raises Damaged for a file that the safetensors library does not accept, or with a type beyond `DTYPES`, and
    CheckpointError for a header that no model has.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if LARGEST_HEADER < length < path.stat().st_size:
        raise CheckpointError(
            f'"{path}" has a header of {length} bytes, expected at most {LARGEST_HEADER}: get the model from its source'
        )
    try:
        with safe_open(path, framework="np"):  # checks the whole header
            pass
    except SafetensorError as error:
        raise Damaged(f"{error!s:.200}") from error
    with open(path, "rb") as file:
        header = parse_json(file.read(8 + length)[8:])
    metadata = header.pop("__metadata__", None) or {}
    try:
        return {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}, metadata
    except TypeError as error:  # the library also accepts an entry that is a list
        raise Damaged("its header does not describe its tensors by name") from error


def _stored(path: Path, name: str, entry: dict, data: int) -> StoredTensor:
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if dtype not in DTYPES:
        raise Damaged(f"{name!r:.200} is of the type {dtype!r:.40}, expected {', '.join(DTYPES)}")
    # A side of 0 must not hide others whose strides overflow.
    if len(shape) > 8 or math.prod(max(side, 1) for side in shape) >= 2**60:
        raise Damaged(f"{name!r:.200} has the shape {list(shape)!s:.80}")
    start = data + entry["data_offsets"][0]
    return StoredTensor(path, DTYPES[dtype], shape, partial(_map, path, DTYPES[dtype], shape, start))


def _map(path: Path, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    """The tensor that begins `start` bytes into the file. Whoever changes it changes a private copy, never the file.

    Each tensor has a mapping of its own, where the safetensors library has one for the whole file: so the pages of a
    tensor leave memory with it. Weights that are converted or packed one by one are then never there twice, which
    takes the peak of sampling with SD 1.5 from 11.5 to 7.3 GB.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    if size < MIN_MAPPED or sys.platform == "win32":  # Windows charges every private mapping in full
        with open(path, "rb") as file:
            file.seek(start)
            return torch.frombuffer(bytearray(file.read(size)), dtype=dtype).reshape(shape)
    # Python's mmap would keep the file open for each tensor, and systems allow a program as few as 256 open files.
    mapped = torch.UntypedStorage.from_file(str(path), False, start + size)
    return torch.empty(0, dtype=dtype).set_(mapped[start:], 0, shape)


def parse_json(text: bytes | str) -> dict:
    """A JSON object. Raises Damaged for everything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is not readable as JSON ({str(error) or 'nested too deeply':.200})") from error
    if not isinstance(values, dict):
        raise Damaged("it is JSON, but not an object")
    return values
