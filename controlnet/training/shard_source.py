"""Pairs in tar archives as a source: all of them by number, or in a stream for which nothing is counted beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from controlnet.common.images import Size
from controlnet.objective import seeded
from controlnet.worlds import Sample

from .identity import Identity, Key, digest_of, digests_of_files
from .pairs import Wanted
from .pairs.shards import pairs_in, unpacked
from .sources import FolderSource, Source


@dataclass(frozen=True)
class Shard:
    """Some pairs of an archive, in its order."""

    path: Path
    start: int = 0
    stop: int | None = None

    def __len__(self) -> int:
        return len(range(count_in(self.path))[self.start : self.stop])


@cache  # a number an archive
def count_in(path: Path) -> int:
    return len(pairs_in(path))


class ShardSource(Source):
    """The pairs of all archives, one after the other. Their headers are read once to count them.

    A pair is unpacked, and `files`, a source without entries of its own, reads what is unpacked as it reads any files.
    """

    def __init__(self, shards: Sequence[Shard], wanted: Wanted, files: FolderSource):
        self.shards, self.wanted, self.files = shards, wanted, files
        self.name, self.maker = files.name, files.maker

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[Shard, int]:
        """-> the archive, the place in it. Raises ValueError for one that is damaged."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[number]
        return shard, shard.start + len(shard) - (int(self.ends[number]) - index)

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """Raises BadSample."""
        shard, place = self.locate(index)
        with unpacked(shard.path, pairs_in(shard.path)[place], self.wanted) as entry:
            return self.files.read(entry, generator)

    def name_of(self, index: int) -> str:
        shard, place = self.locate(index)
        return f"{shard.path}/{pairs_in(shard.path)[place].image.name}"

    def size(self, index: int) -> Size:
        return self.files.transform.size

    def identity(self) -> Identity:
        """An archive is told by its length and both ends, and a pair by its place in it."""
        contents = digests_of_files(shard.path for shard in self.shards)
        fingerprint = {
            **self.files.identity().fingerprint,
            "file names": digest_of(f"{shard.path.name} {shard.start} {shard.stop}" for shard in self.shards),
            "images": digest_of(contents[shard.path] for shard in self.shards),
            "captions": digest_of([repr(self.wanted.prompt)]),
        }
        keys = []
        for shard in self.keyed():
            parts = contents[shard.path], self.wanted.prompt, self.files.transform.size
            for place in range(shard.start, shard.start + len(shard)):
                hint = digest_of([*parts, place, self.files.hint_channels, self.files.detect])
                keys.append(Key(digest_of([*parts, place]), hint))
        return Identity(fingerprint, keys)

    def keyed(self) -> Sequence[Shard]:
        """The archives whose pairs a cache may hold."""
        return self.shards


class ShardStream(ShardSource):
    """Position -> a pair: each epoch takes the archives in a new order, and of each its pairs in a new order.

    An archive's headers are read when the stream comes to it. Position p depends on (seed, p) alone: a run that goes on
    at p reads no more than the headers of the archives before it. `len` is a guess: as many pairs in each archive as in
    the first.
    """

    def __init__(self, shards: Sequence[Shard], wanted: Wanted, files: FolderSource, seed: int = 0):
        super().__init__(shards, wanted, files)
        self.seed = seed
        self.reached = 0, 0  # archives passed, and the pairs in them: from here the search goes on

    def __len__(self) -> int:
        return len(self.shards) * len(self.shards[0])

    def keyed(self) -> Sequence[Shard]:
        return ()  # a stream is not cached

    def locate(self, index: int) -> tuple[Shard, int]:
        passed, first = self.reached if index >= self.reached[1] else (0, 0)
        while True:
            epoch, turn = divmod(passed, len(self.shards))
            if epoch and not first:
                raise ValueError(f'the archives of "{self.name}" hold no pair to train on')
            shard = self.shards[shuffled(len(self.shards), self.seed, 4, epoch)[turn]]
            if index < first + len(shard):
                self.reached = passed, first
                return shard, shard.start + shuffled(len(shard), self.seed, 5, passed)[index - first]
            passed, first = passed + 1, first + len(shard)


@lru_cache(maxsize=4)
def shuffled(length: int, *seeds: int) -> list[int]:
    return torch.randperm(length, generator=seeded(*seeds)).tolist()
