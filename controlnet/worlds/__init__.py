"""Synthetic datasets: endless, seeded pairs of a hint and an image, with captions and ground truth.

- `fill50k`: a plain disc on a plain background, from its outline.
- `people`: a cartoon person in a random pose, from its skeleton.
- `shapes`: overlapping circles, squares, triangles and stars, from their Canny edges.
- `edges`: shapes and people in turn, both from their Canny edges.

Sample i depends on the dataset and the seed alone, not on what was drawn before. Validation sets (`held_out`) have
random streams of their own: whatever the seeds, their samples are not those of a training set.
"""

from dataclasses import replace

from .fill50k import Fill50k
from .people import People
from .scenes import Scenes
from .shapes import Shapes
from .world import Interleaved, Sample, World, edges

__all__ = [
    "EXAMPLE_OF",
    "TINY_CONTROL_OF",
    "WORLDS",
    "Edges",
    "Fill50k",
    "Interleaved",
    "People",
    "Sample",
    "Scenes",
    "Shapes",
    "World",
]


class Edges(Interleaved):
    name = "edges"

    def __init__(self, *args, **kwargs):
        super().__init__([Shapes(*args, **kwargs), People(*args, **kwargs)])

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, hint=edges(sample.image))


WORLDS = {world.name: world for world in (Fill50k, People, Scenes, Shapes, Edges)}

# Dataset -> the hint in assets/ that resembles its own, and the small ControlNet in weights/ trained on it.
EXAMPLE_OF = {
    "fill50k": "circle.png",
    "people": "pose.png",
    "shapes": "canny.png",
    "scenes": "canny.png",
    "edges": "canny.png",
}
TINY_CONTROL_OF = {"fill50k": "tiny-fill50k", "people": "tiny-pose", "edges": "tiny-canny"}
