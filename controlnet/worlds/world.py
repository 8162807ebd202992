"""What the synthetic datasets share: pictures, samples and ground truth, the base class, and distinct colours."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .canvas import RGB
from .colours import COLOURS


@dataclass(frozen=True)
class Thing:
    """What captions say of one thing in a scene, as "house", "red", "large", "left"."""

    kind: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Truth:
    """What is where in a scene. Sky, ground and what is far away have the names of scenes/setting.py."""

    classes: np.ndarray  # uint8 (H, W): numbers in classes.CLASSES
    objects: np.ndarray  # int8 (H, W): number of the thing that is seen there, -1 where none is
    depth: np.ndarray  # float32 (H, W), from 0, the nearest, to 1, the sky
    things: tuple[Thing, ...]
    sky: str
    ground: str
    far: str


@dataclass(frozen=True)
class Sample:
    """An image with its hint and caption; from a synthetic dataset also with the ground truth."""

    image: np.ndarray  # uint8 (H, W, 3)
    hint: np.ndarray  # uint8 (H, W, 3); with a hole to inpaint float32 in [0, 1], and -1 in it
    caption: str
    mask: np.ndarray | None = None  # bool (H, W): where the object is, or the objects
    keypoints: np.ndarray | None = None  # of a person: float (18, 2), x and y in pixels, in the order of COCO-18
    truth: Truth | None = None  # of a scene


@dataclass(frozen=True)
class Picture:
    """A sample without its hint, which is made from it (hints.py)."""

    image: np.ndarray
    caption: str
    parts: np.ndarray  # uint8 (H, W): equal where the same part is seen; scribbles are drawn between them
    mask: np.ndarray
    keypoints: np.ndarray | None = None
    truth: Truth | None = None

    def with_hint(self, hint: np.ndarray) -> Sample:
        return Sample(self.image, hint, self.caption, self.mask, self.keypoints, self.truth)


class World:
    """A synthetic dataset of square images, `size` pixels a side, in some `colours`. `draw` alone makes no hint."""

    name: str

    def __init__(
        self, size: int = 128, seed: int = 0, colours: tuple[str, ...] = tuple(COLOURS), held_out: bool = False
    ):
        self.size, self.seed, self.colours = size, seed, colours
        self.stream = zlib.crc32(f"{self.name} held out".encode() if held_out else self.name.encode())

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.stream, self.seed, index])

    def draw(self, index: int) -> Picture:
        raise NotImplementedError

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        """The hint, uint8 (H, W, 3), of what `draw(index)` returned."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        picture = self.draw(index)
        return picture.with_hint(self.hint(index, picture))


def joined(parts: Sequence[str]) -> str:
    """As "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def distinct_colours(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    """`count` colours that differ by 80 in RGB, for the eye, and by 30 levels of gray, for an edge detector."""
    while True:
        chosen = [str(name) for name in rng.choice(names, size=count, replace=False)]
        pairs = [(COLOURS[a], COLOURS[b]) for a, b in combinations(chosen, 2)]
        if all(distance(a, b) >= 80 and abs(luma(a) - luma(b)) >= 30 for a, b in pairs):
            return chosen


def distance(a: RGB, b: RGB) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def luma(colour: RGB) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))
