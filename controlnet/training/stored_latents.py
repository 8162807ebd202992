"""A cache's folder (latent_cache.py) as it is read: which samples it holds, whole or damaged, and their rows."""

import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from controlnet.common.image_files import open_image
from controlnet.common.images import Size, to_hints, to_uint8
from controlnet.hints import inpaint
from controlnet.objective import EncodedPairs

from .identity import Key
from .sources import Source

SHARDS = "[0-9a-f]" * 16 + ".safetensors"  # their names are digests


def hint_path(folder: Path, hint: str) -> Path:
    return folder / "hints" / f"{hint}.png"


def hint_as_image(hint: np.ndarray) -> Image.Image:
    """The image that a hint is stored as: a hole to inpaint, where it is -1, is transparent."""
    if hint.dtype == np.uint8:
        return Image.fromarray(hint)
    opacity = np.where(hint[..., :1] < 0, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([to_uint8(to_hints([hint])[0]), opacity]))


def hint_from_image(image: Image.Image) -> np.ndarray:
    pixels = np.array(image)
    return inpaint(pixels[..., :3], pixels[..., 3] == 0) if image.mode == "RGBA" else pixels


class Place(NamedTuple):
    shard: Path
    row: int


class Stored:
    """Which of the samples with these keys a folder holds. With `check` damaged files are removed, to be computed
    again; `check` is for the one process whose samples they hold."""

    def __init__(self, folder: Path, keys: Sequence[Key], check: bool):
        self.folder, wanted = folder, {key.latents for key in keys}
        self.places: dict[str, Place] = {}
        self.bad: set[Key] = set()
        for path in sorted(folder.glob(SHARDS)):  # no file of the user's own
            held = names_in(path)
            ours = not wanted.isdisjoint(held["keys"] + [latents for latents, _ in held["bad"]])
            # All bits are looked at in ours alone; of others it is enough that they name samples.
            if check and not (is_whole(path) if ours else any(held.values())):
                tqdm.write(f'"{path}" is damaged: it is computed again')
                path.unlink(missing_ok=True)
            elif ours:
                for row, name in enumerate(held["keys"]):
                    self.places.setdefault(name, Place(path, row))
                self.bad |= {Key(*names) for names in held["bad"]}

    def has(self, key: Key) -> bool:
        """Whether it is stored, or known to be bad."""
        return key.latents in self.places or key in self.bad

    def lacks_hint(self, source: Source, key: Key) -> bool:
        return not source.hints_are_files and key not in self.bad and not hint_path(self.folder, key.hint).exists()


def names_in(path: Path) -> dict:
    """The samples that a shard names: `keys` by row, and those found to be `bad`. Both are empty for a file that cannot
    be read."""
    try:
        with safe_open(path, "pt") as file:
            held = json.loads(file.metadata()["samples"])
        return {"keys": list(held["keys"]), "bad": [list(map(str, names)) for names in held["bad"]]}
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return {"keys": [], "bad": []}


class LatentCache:
    """A complete cache, memory-mapped: row -> the index of its sample, its latents and its hint."""

    def __init__(self, folder: Path, source: Source, keys: Sequence[Key]):
        stored = Stored(folder, keys, check=False)  # which `build` has done
        good = [i for i, key in enumerate(keys) if key.latents in stored.places and key not in stored.bad]
        places = [stored.places[keys[i].latents] for i in good]
        number = {path: n for n, path in enumerate(sorted({place.shard for place in places}))}
        # (rows, 3): the sample's index, its shard's number and the row in it
        table = [(i, number[place.shard], place.row) for i, place in zip(good, places, strict=True)]
        self.table = np.array(table, dtype=np.int64).reshape(-1, 3)
        self.hints = [] if source.hints_are_files else [keys[i].hint for i in good]
        self.folder, self.source, self.paths = folder, source, list(number)
        self.shards = [load_file(path) for path in self.paths]

    def __getstate__(self) -> dict:
        """Without the latents: spawned workers open the files themselves."""
        return {**self.__dict__, "shards": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, shards=[load_file(path) for path in state["paths"]])

    def __len__(self) -> int:
        return len(self.table)

    def index(self, row: int) -> int:
        return int(self.table[row, 0])

    def size(self, row: int) -> Size:
        height, width = self.shards[self.table[row, 1]]["size"].tolist()
        return height, width

    def read(self, row: int, position: int) -> tuple[EncodedPairs, Tensor]:
        """Encoding and hint (C, H, W). Raises BadSample where the hint's file is gone or unreadable by now."""
        _, number, i = self.table[row].tolist()
        encoded = EncodedPairs(*(self.shards[number][name][i] for name in EncodedPairs._fields))
        return encoded, to_hints([self.hint(row)])[0]

    def hint(self, row: int) -> np.ndarray:
        """(H, W, C), computed again if the cache's file is lost or of another size. Raises BadSample."""
        if self.hints:
            with suppress(ValueError):
                cached = hint_from_image(open_image(hint_path(self.folder, self.hints[row])))
                if cached.shape == (*self.size(row), 3):
                    return cached
        return self.source.hint(self.index(row))

    def missing(self) -> list[int]:
        """The indices of the bad samples, which have no row."""
        return sorted(set(range(len(self.source))) - set(self.table[:, 0].tolist()))


def is_whole(path: Path) -> bool:
    """Whether a shard is readable and holds the bits that were written."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
            return metadata["crc32"] == checksum(tensors, metadata["samples"])
    except (OSError, SafetensorError, KeyError, TypeError):
        return False


def checksum(tensors: dict[str, Tensor], samples: str) -> str:
    crc = zlib.crc32(samples.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(raw_bytes(tensor), crc)
    return f"{crc:08x}"


def raw_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
