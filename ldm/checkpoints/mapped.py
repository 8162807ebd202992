"""Tensors that stay in their file until they are needed, and the safetensors format.

A checkpoint is opened by finding out where in the file each tensor stands; nothing else is read. A tensor is then a
view of its part of the file, which the operating system maps into memory page by page. Whoever changes it changes a
private copy of that page, never the file. The pages leave memory with their tensor. Small tensors are simply read.
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A file that cannot be used: one sentence with what was found, what was expected and what to do."""


LARGE = 2**17  # bytes: to map a tensor takes as long as to read so many


@dataclass(frozen=True)
class MappedFile:
    path: Path

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def whole(self) -> torch.UntypedStorage:
        return self.map_until(self.size)

    def map_until(self, end: int) -> torch.UntypedStorage:
        return torch.UntypedStorage.from_file(str(self.path), False, end)

    def memory(self, start: int, count: int) -> torch.UntypedStorage:
        """Bytes of the file: if they are many, as pages that come into memory when they are used."""
        if count < LARGE:
            return torch.frombuffer(bytearray(self.read(start, count)), dtype=torch.uint8).untyped_storage()
        # Windows charges each mapping in full, so there is one for all. Python's own mmap would map no more than is
        # wanted, but keeps the file open for each tensor, and systems allow a program as few as 256 open files.
        mapped = self.whole if sys.platform == "win32" else self.map_until(start + count)
        return mapped[start : start + count]

    def read(self, start: int, count: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(count)


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands: its numbers begin `start` bytes into the file, `strides` count elements."""

    file: MappedFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """In bytes, from the first to the last number."""
        return extent(self.shape, self.strides) * self.dtype.itemsize if self.numel else 0

    @property
    def is_mapped(self) -> bool:
        return self.size >= LARGE

    def view(self) -> Tensor:
        """The tensor in the file: if it is large, it costs no memory before it is used."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        memory = self.file.memory(self.start, self.size)
        return torch.empty(0, dtype=self.dtype).set_(memory, 0, self.shape, self.strides)

    def load(self, dtype: torch.dtype, device: torch.device, rows: slice = slice(None)) -> Tensor:
        """Some rows, or all: a view where dtype and device allow it, else a converted copy."""
        tensor = self.view() if rows == slice(None) else self.view()[rows]
        return tensor.to(device, dtype)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements lie between the first and the last of a tensor that is not empty, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def is_shape(values: object) -> bool:
    """A tuple or list of few numbers that are none of them negative or absurd. Strides are judged alike."""
    plausible = isinstance(values, tuple | list) and len(values) <= 8
    return plausible and all(type(value) is int and 0 <= value < 2**40 for value in values)


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
LARGEST_HEADER = 100_000_000


class Damaged(Exception):
    """What is wrong in a file, for the sentence of a CheckpointError."""


def read_safetensors(file: MappedFile) -> tuple[dict[str, Stored], dict[str, str]]:
    """-> the tensors by name, and the metadata.

    The file is the length of its header (8 bytes, little-endian), the header, a JSON object, and the tensors' bytes,
    one after the other without gaps. Raises Damaged for anything else.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= min(file.size - 8, LARGEST_HEADER):
        raise Damaged(f"its header of {length} bytes does not fit into its {file.size} bytes")
    header = parse_json(file.read(8, length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged("its metadata are not texts by name")

    tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].numel)):
        if tensor.start != end:
            raise Damaged(f"{name!r:.200} begins at byte {tensor.start}, expected {end}")
        end += tensor.numel * tensor.dtype.itemsize
    if end != file.size:
        raise Damaged(f"it has {file.size} bytes, its header says {end}")
    return tensors, metadata


def _stored(file: MappedFile, name: str, entry: object, data: int) -> Stored:
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise Damaged(f"its header does not describe {name!r:.200} as a tensor")
    if dtype not in DTYPES:
        raise Damaged(f"{name!r:.200} is of the type {dtype!r:.40}, expected {', '.join(DTYPES)}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise Damaged(f"{name!r:.200} has {offsets[1] - offsets[0]} bytes, its shape needs {size}")
    return Stored(file, DTYPES[dtype], tuple(shape), contiguous_strides(tuple(shape)), data + offsets[0])


def parse_json(text: bytes | str) -> dict:
    """A JSON object whose keys differ. Raises Damaged for everything else."""
    try:
        values = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is not readable as JSON ({str(error) or 'nested too deeply':.200})") from error
    if not isinstance(values, dict):
        raise Damaged("it is JSON, but no object")
    return values


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands there twice")
    return values
