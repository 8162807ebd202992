"""Where training samples come from: synthetic datasets and folders of pairs, and the transform to the size wanted.

Sizes are (height, width) in pixels. Images and hints are uint8 arrays (H, W, C).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from controlnet.common.images import Size, resized
from controlnet.hints import detect, find_detector, parse_detector
from controlnet.inference.png_text import fingerprint as file_fingerprint
from controlnet.worlds import WORLDS, Sample

from .folders import check_same_shape, read_hint, read_pixels, size_of
from .pairs import Entry

# ------------------------------------------------------------------------------------------------------- transform


@dataclass(frozen=True)
class Transform:
    """To `size`: resized to cover it, cropped in the middle or at random, perhaps mirrored."""

    size: Size
    random_crop: bool = False
    flip: bool = False

    def of(self, image_size: Size, generator: torch.Generator | None = None) -> Callable[[np.ndarray], np.ndarray]:
        """For an image of this size and its hint alike, which then lie on each other, pixel by pixel.

        Without a generator nothing is random: the crop is in the middle, and nothing is mirrored.
        """
        height, width = self.size
        scale = max(height / image_size[0], width / image_size[1])
        covering = max(height, round(image_size[0] * scale)), max(width, round(image_size[1] * scale))
        slack = covering[0] - height, covering[1] - width
        top, left = slack[0] // 2, slack[1] // 2
        if self.random_crop and generator is not None:
            top, left = (int(torch.randint(s + 1, (), generator=generator)) for s in slack)
        mirrored = self.flip and generator is not None and bool(torch.rand((), generator=generator) < 0.5)

        def place(array: np.ndarray) -> np.ndarray:
            array = resized_array(array, covering)[top : top + height, left : left + width]
            return np.ascontiguousarray(array[:, ::-1] if mirrored else array)

        return place


def resized_array(array: np.ndarray, size: Size) -> np.ndarray:
    """(H, W, C) for any C: channel by channel, so that none is taken for a transparency that weighs the others."""
    if array.shape[:2] == size:
        return array
    if array.shape[2] == 3:
        return np.array(resized(Image.fromarray(array), size))
    channels = [resized(Image.fromarray(array[..., i]), size) for i in range(array.shape[2])]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


# --------------------------------------------------------------------------------------------------------- sources


class Source(Protocol):
    """Samples by index."""

    name: str
    hints_are_files: bool  # reading a hint again is as fast as reading it from a cache
    uses_network: bool  # for the hints: reading belongs into the process that has the device

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample: ...

    def hint(self, index: int) -> np.ndarray: ...

    def name_of(self, index: int) -> str: ...

    def fingerprint(self) -> dict: ...

    def missing(self) -> list[Path]: ...


class WorldSource:
    """The first `length` samples of a synthetic dataset."""

    hints_are_files = uses_network = False

    def __init__(self, name: str, size: Size, length: int, seed: int = 0, held_out: bool = False):
        if size[0] != size[1]:
            raise ValueError(f"the images of {name} are square, and the size is {size[1]}x{size[0]}: give one side")
        self.name, self.length, self.held_out = name, length, held_out
        self.seed = 0 if held_out else seed  # validation is the same for every run
        self.world = WORLDS[name](size[0], self.seed, held_out=held_out)

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample:
        return self.world[index]

    def hint(self, index: int) -> np.ndarray:
        return self.world[index].hint

    def name_of(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> dict:
        """The first image stands for the code that draws it."""
        first = self.world[0]
        pixels = digest(first.image.tobytes(), first.hint.tobytes(), first.caption.encode())
        return {"world": self.name, "seed": self.seed, "held out": self.held_out, "first image": pixels}

    def missing(self) -> list[Path]:
        return []


class FolderSource:
    """Pairs on disk, with hints from files or, with `detect`, made from the images."""

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        transform: Transform,
        hint_channels: int = 3,
        detect: str | None = None,
    ):
        self.name, self.entries, self.transform = name, entries, transform
        self.hint_channels, self.detect = hint_channels, detect
        self.hints_are_files = detect is None
        self.uses_network = detect is not None and find_detector(parse_detector(detect)[0]).is_network
        self.make_hint = None if detect is None else photograph_detector(detect)

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """Raises BadSample."""
        entry = self.entries[index]
        image = read_pixels(entry.image)
        place = self.transform.of(image.shape[:2], generator)
        if self.make_hint is not None:  # on the image as the model sees it: edges are a pixel wide at its size
            image = place(image)
            return Sample(image, self.make_hint(image), entry.caption)
        hint = read_hint(entry.hint, self.hint_channels)
        check_same_shape(image, hint, entry)
        return Sample(place(image), place(hint), entry.caption)

    def hint(self, index: int) -> np.ndarray:
        """The hint of `sample` without randomness. Raises BadSample."""
        if self.make_hint is not None:
            return self.sample(index).hint
        entry = self.entries[index]
        return self.transform.of(size_of(entry.image))(read_hint(entry.hint, self.hint_channels))

    def name_of(self, index: int) -> str:
        return str(self.entries[index].image)

    def fingerprint(self) -> dict:
        """By what the data are and not where or since when. Reading all images would take as long as an epoch: of
        each its size counts, and of a few the contents."""
        images, few = [e.image for e in self.entries], 1 + len(self.entries) // 256
        hints = [e.hint for e in self.entries if e.hint is not None]
        files = images + hints
        return {
            "file names": digest_of(os.path.relpath(file, self.name) for file in files),
            "file sizes": digest_of(file.stat().st_size if file.is_file() else 0 for file in files),
            "file contents": digest_of(contents(file) for file in images[::few] + hints[::few]),
            "captions": digest_of(entry.caption for entry in self.entries),
            "detect": self.detect,
            "hint channels": self.hint_channels,
        }

    def missing(self) -> list[Path]:
        """For each pair that lacks a file the first one that is not there."""
        files = [[file for file in (e.image, e.hint) if file is not None and not file.is_file()] for e in self.entries]
        return [gone[0] for gone in files if gone]


def photograph_detector(text: str) -> Callable[[np.ndarray], np.ndarray]:
    """ "canny" or "canny:low=50": image -> hint, both uint8 (H, W, 3). Raises ValueError for what makes none."""
    name, options = parse_detector(text)
    if not find_detector(name).works_on_photographs:
        raise ValueError(f'"{name}" makes no hints from images, but from files of its own: take another --detect')
    return partial(detect, name, **options)


def contents(path: Path) -> str:
    try:
        return file_fingerprint(path)
    except OSError:
        return ""


def digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]


def digest_of(values: Iterable[str | int]) -> str:
    return digest(repr(list(values)).encode())


# Of these a fingerprint holds a hash, whose value tells nobody anything.
DIGESTS = {"base", "UNet", "first image", "file names", "file sizes", "file contents", "captions"}


def differences(before: dict, now: dict) -> str:
    """What differs between two fingerprints, in words; "" if nothing does."""
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(key if key in DIGESTS else f"{key}: {now.get(key)} where {before.get(key)} was" for key in keys)


class BadSamples:
    """Counts those that were met, and stops the run where they are too many."""

    def __init__(
        self, total: int, problems: Sequence[str], share: float, name_of: Callable[[int], str] = "number {}".format
    ):
        self.total, self.share, self.name_of = total + len(problems), share, name_of
        self.unlisted, self.names = len(problems), set()
        self.check(problems[0] if problems else "")

    def __len__(self) -> int:
        return self.unlisted + len(self.names)

    def add(self, indices: Iterable[int]) -> None:
        """-1 is none. Raises ValueError if too many are bad by now."""
        new = {self.name_of(index) for index in sorted(indices) if index >= 0} - self.names
        if new:
            self.names |= new
            self.check(min(new))

    def check(self, example: str) -> None:
        if len(self) > self.share * self.total:
            raise ValueError(
                f"{len(self)} of {self.total} samples are bad (for example {example}), more than the share of "
                f"{self.share:g} that --bad-share allows: see `python -m tools.check_data`"
            )
