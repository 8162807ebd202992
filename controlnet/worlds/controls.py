"""The datasets named for a control: pictures of several worlds, all with the same kind of hint."""

import numpy as np

from .hints import depth, edges, scribble, segmentation
from .people import People
from .scenes import Scenes
from .shapes import Shapes
from .world import Picture, World


class InTurn(World):
    """Scenes, shapes and people in turn: picture i is picture i // 3 of world i % 3."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.worlds = [world(*args, **kwargs) for world in (Scenes, Shapes, People)]

    def draw(self, index: int) -> Picture:
        return self.worlds[index % 3].draw(index // 3)


class Canny(InTurn):
    name = "canny"

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return edges(picture)


class Scribble(InTurn):
    name = "scribble"

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return scribble(picture, self.rng(index))


class Seg(Scenes):
    name = "seg"

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return segmentation(picture)


class Depth(Scenes):
    name = "depth"

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return depth(picture)
