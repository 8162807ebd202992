"""Synthetic datasets: endless, seeded pairs of a hint and an image, with captions and ground truth.

Four worlds draw pictures, each with a hint of its own:

- `fill50k`: a plain disc on a plain background, from its outline.
- `people`: a cartoon person in a random pose, from its skeleton.
- `shapes`: overlapping circles, squares, triangles and stars, from their Canny edges.
- `scenes`: small illustrations, things in a landscape, from their Canny edges.

And there is a dataset for each other control: `canny` and `scribble` of scenes, shapes and people in turn, `seg` (in
ADE20K's colours) and `depth` of scenes, where every pixel's class and depth are known. `edits` are scenes before and
after a change, which the caption asks for.

Sample i depends on the dataset's arguments alone, not on what was drawn before. Validation sets (`held_out`) have
random streams of their own: they share no samples with a training set, whatever its seed.
"""

from .controls import Canny, Depth, Scribble, Seg
from .edits import Edits
from .fill50k import Fill50k
from .people import People
from .scenes import Scenes
from .shapes import Shapes
from .world import Picture, Sample, Truth, World

__all__ = [
    "TINY_CONTROL_OF",
    "WORLDS",
    "Canny",
    "Depth",
    "Edits",
    "Fill50k",
    "People",
    "Picture",
    "Sample",
    "Scenes",
    "Scribble",
    "Seg",
    "Shapes",
    "Truth",
    "World",
]

WORLDS = {world.name: world for world in (Fill50k, People, Shapes, Scenes, Canny, Scribble, Seg, Depth, Edits)}

# Dataset -> the small ControlNet in weights/ trained on it.
TINY_CONTROL_OF = {
    "fill50k": "tiny-fill50k",
    "people": "tiny-pose",
    "canny": "tiny-canny",
    "scribble": "tiny-scribble",
    "seg": "tiny-seg",
    "depth": "tiny-depth",
}
