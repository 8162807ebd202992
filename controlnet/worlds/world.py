"""What the synthetic datasets share: samples, the base class, edges and distinct colours."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from controlnet.hints.canny import canny

from .colours import COLOURS

EDGE_THRESHOLDS = (50, 100)  # of Canny: half the usual, so that 25 levels of gray suffice for an edge


@dataclass(frozen=True)
class Sample:
    """An image with its hint and caption; from a synthetic dataset also with the ground truth."""

    image: np.ndarray  # uint8 (H, W, 3)
    hint: np.ndarray  # uint8 (H, W, 3)
    caption: str
    mask: np.ndarray | None = None  # bool (H, W): where the object is
    keypoints: np.ndarray | None = None  # of a person: float (18, 2), x and y in pixels, in the order of COCO-18


class World:
    """A synthetic dataset of square images, `size` pixels a side, in some `colours`."""

    name: str

    def __init__(
        self, size: int = 128, seed: int = 0, colours: tuple[str, ...] = tuple(COLOURS), held_out: bool = False
    ):
        self.size, self.seed, self.colours = size, seed, colours
        self.stream = zlib.crc32(f"{self.name} held out".encode() if held_out else self.name.encode())

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.stream, self.seed, index])


class Interleaved:
    """Several datasets in turn: of n datasets, sample i is sample i // n of dataset i % n."""

    def __init__(self, worlds: Sequence[World]):
        self.worlds, self.size = worlds, worlds[0].size

    def __getitem__(self, index: int) -> Sample:
        turn, world = divmod(index, len(self.worlds))
        return self.worlds[world][turn]


def edges(image: np.ndarray) -> np.ndarray:
    """The Canny edges of uint8 (H, W, 3) as a hint of the same shape."""
    return canny(image, *EDGE_THRESHOLDS)[..., None].repeat(3, axis=2)


def distinct_colours(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    """`count` colours that the eye can tell apart and, 30 levels of gray apart, an edge detector too."""
    while True:
        chosen = [str(name) for name in rng.choice(names, size=count, replace=False)]
        pairs = [(COLOURS[a], COLOURS[b]) for a, b in combinations(chosen, 2)]
        if all(distance(a, b) >= 80 and abs(luma(a) - luma(b)) >= 30 for a, b in pairs):
            return chosen


def distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def luma(colour: tuple[int, int, int]) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))
