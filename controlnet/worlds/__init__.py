"""Synthetic datasets: endless, seeded pairs of a hint and an image, with caption and ground truth.

- `fill50k`: flat discs on a flat ground, from their outlines.
- `people`: a cartoon person in a free pose, from its skeleton.
- `shapes`: overlapping circles, squares, triangles and stars, from their Canny edges.
- `edges`: shapes and people in turn, with Canny edges as hints for both.

Sample i of a dataset and a seed is always the same image, whatever was drawn before it. A held-out one has none of the
images that those for training have, whatever their seeds.
"""

from dataclasses import replace

from .fill50k import Fill50k
from .people import People
from .shapes import Shapes
from .world import InTurn, Sample, World, edges

__all__ = [
    "EXAMPLE_OF",
    "TINY_CONTROL_OF",
    "WORLDS",
    "Edges",
    "Fill50k",
    "InTurn",
    "People",
    "Sample",
    "Shapes",
    "World",
]


class Edges(InTurn):
    name = "edges"

    def __init__(self, *args, **kwargs):
        super().__init__([Shapes(*args, **kwargs), People(*args, **kwargs)])

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, hint=edges(sample.image))


WORLDS = {world.name: world for world in (Fill50k, People, Shapes, Edges)}

# World -> the hint in assets/ that is like its own, and the small ControlNet in weights/ that learned them.
EXAMPLE_OF = {"fill50k": "circle.png", "people": "pose.png", "shapes": "canny.png", "edges": "canny.png"}
TINY_CONTROL_OF = {"fill50k": "tiny-fill50k", "people": "tiny-pose", "edges": "tiny-canny"}
