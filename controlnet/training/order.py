"""Which sample stands where in a run.

Position p is the p-th sample that a run looks at, counted over all processes, accumulated batches and epochs. Which
sample that is follows from (seed, p) alone, so a resumed run needs to know nothing but p, and may have another batch
size and number of processes. With aspect buckets, whose batches are of one size each, the batch size stays.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch import Tensor

from controlnet.common.images import Size
from controlnet.objective import seeded


@lru_cache(maxsize=64)  # a batch may lie across two epochs, and each bucket has its own
def permutation(length: int, seed: int, epoch: int, *bucket: int) -> Tensor:
    return torch.randperm(length, generator=seeded(seed, 1, epoch, *bucket))


def sample_at(position: int, length: int | None, seed: int, *bucket: int) -> int:
    """Which of `length` samples: each epoch has all of them in a new order. None is endless."""
    if length is None:
        return position
    epoch, place = divmod(position, length)
    return int(permutation(length, seed, epoch, *bucket)[place])


def batch_positions(start: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[range]:
    """The batches of one process from position `start` on: the processes take turns."""
    for turn in count():
        first = start + (turn * world_size + rank) * batch_size
        yield range(first, first + batch_size)


class Shuffled:
    """All samples in a new order in each epoch; `endless` ones in their own.

    `at` gives the index of the sample at a position, `instead` those that may stand in its place, the next one first.
    """

    def __init__(self, length: int, seed: int, endless: bool = False):
        self.length, self.seed, self.endless = length, seed, endless

    def at(self, position: int) -> int:
        return sample_at(position, None if self.endless else self.length, self.seed)

    def instead(self, index: int) -> list[int]:
        if self.endless:
            return [index + step for step in range(1, 100)]
        return [(index + step) % self.length for step in range(1, min(self.length, 100))]


class Bucketed:
    """Batches of one size each, from samples of the sizes given. `at` and `instead` as in `Shuffled`.

    The k-th batch has the size of the sample that would stand at position k, so all sizes come as often as samples have
    them. It is filled with that size's own samples, which are shuffled anew whenever all have been seen: no batch is
    short, and none is left out, however few have its size.
    """

    def __init__(self, sizes: Sequence[Size], seed: int, batch_size: int):
        self.seed, self.batch_size = seed, batch_size
        number = {size: i for i, size in enumerate(sorted(set(sizes)))}
        self.bucket_of = np.array([number[size] for size in sizes], dtype=np.int64)
        self.members = [np.flatnonzero(self.bucket_of == i) for i in range(len(number))]

    def at(self, position: int) -> int:
        batch, place = divmod(position, self.batch_size)
        cycle, turn = divmod(batch, len(self.bucket_of))
        buckets, earlier = batches_of_cycle(self, cycle)
        bucket = int(buckets[turn])
        members = self.members[bucket]
        # In a cycle, of as many batches as there are samples, each bucket has as many batches as members.
        own = (cycle * len(members) + int(earlier[turn])) * self.batch_size + place
        return int(members[sample_at(own, len(members), self.seed, bucket + 1)])

    def instead(self, index: int) -> list[int]:
        """Those of its size, then the others, size by size: batches of a bad bucket, too, have one size."""
        bucket = self.bucket_of[index]
        own, *others = self.members[bucket:] + self.members[:bucket]
        return np.concatenate([own[own > index], own[own < index], *others])[:99].tolist()


@lru_cache(maxsize=4)
def batches_of_cycle(order: Bucketed, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """For each batch of a cycle: its bucket, and how many batches of that bucket come before it."""
    buckets = order.bucket_of[permutation(len(order.bucket_of), order.seed, cycle).numpy()]
    earlier = np.empty_like(buckets)
    for bucket, members in enumerate(order.members):
        earlier[buckets == bucket] = np.arange(len(members))
    return buckets, earlier


Order = Shuffled | Bucketed
