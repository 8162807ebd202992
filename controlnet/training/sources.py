"""Where training samples come from: synthetic datasets and folders of pairs.

Sizes are (height, width) in pixels. Images and hints are uint8 arrays (H, W, C).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch

from controlnet.common.image_files import Ground
from controlnet.common.images import Size
from controlnet.hints import detect, find_detector, inpaint_at_random, parse_detector
from controlnet.hints.detectors import ground_for
from controlnet.worlds import WORLDS, Sample

from .identity import Identity, Key, digest, digest_of, digests_of_files
from .pair_files import check_file, check_same_shape, read_hint, read_pixels, size_of
from .pairs import BadSample, Entry
from .transform import Transform


class Source(Protocol):
    name: str
    hints_are_files = False  # reading a hint again is as fast as reading it from a cache
    maker: "HintMaker | None" = None  # of hints, where they are made from the images

    @property
    def uses_network(self) -> bool:
        """For the hints: reading then belongs into the process that has the device."""
        return self.maker is not None and self.maker.is_network

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample: ...

    def hint(self, index: int) -> np.ndarray:
        """The hint of `sample` without randomness. Raises BadSample."""
        return self.sample(index).hint

    def size(self, index: int) -> Size: ...  # of image and hint

    def name_of(self, index: int) -> str: ...

    def identity(self) -> Identity: ...


class WorldSource(Source):
    """The first `length` samples of a synthetic dataset, with its own hints or, with `detect`, made from the images."""

    def __init__(
        self, name: str, size: Size, length: int, seed: int = 0, held_out: bool = False, detect: str | None = None
    ):
        if size[0] != size[1]:
            raise ValueError(f"the images of {name} are square, and the size is {size[1]}x{size[0]}: give one side")
        self.name, self.length, self.held_out = name, length, held_out
        self.seed = 0 if held_out else seed  # validation is the same for every run
        self.side = size[0]
        self.world = WORLDS[name](self.side, self.seed, held_out=held_out)
        self.detect, self.maker = detect, hint_maker(detect)

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample:
        sample = self.world[index]
        return sample if self.maker is None else replace(sample, hint=self.maker.make(sample.image))

    def size(self, index: int) -> Size:
        return self.side, self.side

    def name_of(self, index: int) -> str:
        return f"number {index}"

    def identity(self) -> Identity:
        """The first samples stand for the code that draws them."""
        samples = [self.world[i] for i in range(3)]
        first = samples[0]
        pixels = digest(first.image.tobytes(), first.hint.tobytes(), first.caption.encode())
        fingerprint = {"world": self.name, "seed": self.seed, "held out": self.held_out, "first image": pixels}
        if self.detect is not None:
            fingerprint["detect"] = self.detect
        # Datasets that differ in their hints alone share latents. Those that draw three kinds of pictures in turn are
        # known by one of each.
        drawn = digest_of([self.seed, self.side, *(digest(s.image.tobytes(), s.caption.encode()) for s in samples)])
        hints = digest_of([self.side, *fingerprint.values()])
        return Identity(fingerprint, [Key(f"{drawn}-{i}", f"{hints}-{i}") for i in range(self.length)])


class FolderSource(Source):
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
        self.hint_channels, self.detect, self.maker = hint_channels, detect, hint_maker(detect)
        self.hints_are_files = self.maker is None
        self.image_sizes: dict[int, Size | None] = {}  # of those that were looked at

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample:
        return self.read(self.entries[index], generator)

    def read(self, entry: Entry, generator: torch.Generator | None) -> Sample:
        """Raises BadSample."""
        image = read_pixels(entry.image)
        place = self.transform.of(image.shape[:2], generator)
        if self.maker is not None:  # on the image as the model sees it: edges are a pixel wide at its size
            image, ground = place(image), self.maker.ground
            seen = place(read_pixels(entry.image, ground)) if ground else image
            return Sample(image, self.maker.make(seen), entry.caption)
        hint = read_hint(entry.hint, self.hint_channels)
        check_same_shape(image.shape[:2], hint, entry)
        return Sample(place(image), place(hint), entry.caption)

    def hint(self, index: int) -> np.ndarray:
        if self.maker is not None:
            return super().hint(index)
        entry = self.entries[index]
        image_size, hint = self.image_size(index) or size_of(entry.image), read_hint(entry.hint, self.hint_channels)
        check_same_shape(image_size, hint, entry)
        return self.transform.of(image_size)(hint)

    def size(self, index: int) -> Size:
        """An image that cannot be read has the size that all have without buckets."""
        image_size = self.image_size(index) if self.transform.buckets else None
        return self.transform.size_for(image_size) if image_size else self.transform.size

    def name_of(self, index: int) -> str:
        return str(self.entries[index].image)

    def image_size(self, index: int) -> Size | None:
        """The size of an image by its file's header; None if that cannot be read."""
        if index not in self.image_sizes:
            self.image_sizes[index] = None
            with suppress(BadSample):
                self.image_sizes[index] = size_of(self.entries[index].image)
        return self.image_sizes[index]

    def identity(self) -> Identity:
        images = [entry.image for entry in self.entries]
        hints = [entry.hint for entry in self.entries if entry.hint is not None]
        contents = digests_of_files(images + hints)
        fingerprint = {
            "file names": digest_of(os.path.relpath(file, self.name) for file in images + hints),
            "images": digest_of(contents[file] for file in images),
            "hints": digest_of(contents[file] for file in hints),
            "captions": digest_of(entry.caption for entry in self.entries),
            "detect": self.detect,
            "hint channels": self.hint_channels,
        }
        keys = []
        for i, entry in enumerate(self.entries):
            image, size = contents[entry.image], self.size(i)
            hint = (contents[entry.hint], self.hint_channels) if self.detect is None else (image, self.detect)
            keys.append(Key(digest_of([image, entry.caption, size]), digest_of([*hint, size])))
        return Identity(fingerprint, keys)

    def problems(self) -> list[str]:
        """A sentence for each pair with a file that is missing or does not begin as an image."""
        found = []
        for entry in self.entries:
            try:
                for file in filter(None, (entry.image, entry.hint)):
                    check_file(file)
            except BadSample as error:
                found.append(str(error))
        return found


def good_samples(source: Source) -> Iterator[Sample]:
    """All samples of a source except bad ones, which are reported."""
    for index in range(len(source)):
        try:
            yield source.sample(index)
        except BadSample as error:
            print(f"skipped: {error}")


@dataclass(frozen=True)
class HintMaker:
    """How hints are made from the images."""

    make: Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) -> the same or, with a hole to inpaint, float32
    ground: Ground | None = None  # behind what is transparent, where the detector needs another one than white
    is_network: bool = False


def hint_maker(text: str | None) -> HintMaker | None:
    """What --detect names, for example "canny:low=50". Raises ValueError for what makes no hints from images.

    "inpaint" is not one of the detectors: it needs a hole, in training a random one.
    """
    if text is None:
        return None
    if text.lower() == "inpaint":
        return HintMaker(inpaint_at_random)
    name, options = parse_detector(text)
    detector = find_detector(name)
    if not detector.works_on_photographs:
        raise ValueError(f'"{name}" makes no hints from images, but from files of its own: take another --detect')
    return HintMaker(partial(detect, name, **options), ground_for(name), detector.is_network)


class BadSamples:
    """Counts the bad samples that a run meets, and stops it when they are too many."""

    def __init__(
        self, total: int, problems: Sequence[str], share: float, name_of: Callable[[int], str] = "number {}".format
    ):
        self.total, self.share, self.name_of = total + len(problems), share, name_of
        self.unlisted, self.names = len(problems), set()
        self.check(problems[0] if problems else "")

    def __len__(self) -> int:
        return self.unlisted + len(self.names)

    def add(self, indices: Iterable[int]) -> None:
        """Of bad samples, but -1 is none. Raises ValueError if they have become too many."""
        new = {self.name_of(index) for index in sorted(indices) if index >= 0} - self.names
        if new:
            self.names |= new
            self.check(min(new))

    def check(self, example: str) -> None:
        none_left = len(self) == self.total > 0
        if none_left or len(self) > self.share * self.total:
            too_many = "so none is left" if none_left else f"more than --bad-share {self.share:g} allows"
            raise ValueError(
                f"{len(self)} of {self.total} samples are bad (for example {example}), {too_many}: see "
                "`python -m tools.check_data`"
            )
