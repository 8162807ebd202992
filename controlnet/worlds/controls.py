"""The datasets that are named for a control: pictures of the worlds, all with the same kind of hint."""

import numpy as np

from .hints import depth, edges, scribble, segmentation
from .people import People
from .scenes import Scenes
from .shapes import Shapes
from .world import InTurn, Picture


class Canny(InTurn):
    name, kinds = "canny", (Scenes, Shapes, People)

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return edges(picture)


class Scribble(InTurn):
    name, kinds = "scribble", (Scenes, Shapes, People)

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
