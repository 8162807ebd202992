"""`shapes`: one to three overlapping circles, squares, triangles and stars; the hint is their Canny edges."""

import numpy as np

from .canvas import Canvas
from .colours import COLOURS
from .hints import edges
from .world import Picture, World, distinct_colours, joined


class Shapes(World):
    """Captions: 'red circle with white background', 'red circle, blue square and lime star with white background'."""

    name = "shapes"

    def draw(self, index: int) -> Picture:
        rng = self.rng(index)
        kinds = rng.choice(tuple(OUTLINES), size=rng.integers(1, 4))
        ground, *colours = distinct_colours(rng, self.colours, 1 + len(kinds))
        canvas = Canvas(self.size, COLOURS[ground])
        for canvas.label, (kind, colour) in enumerate(zip(kinds, colours, strict=True), 1):
            radius = rng.uniform(0.14, 0.34 if len(kinds) == 1 else 0.26)
            centre = rng.uniform(radius / 2, 1 - radius / 2, size=2)
            canvas.polygon(centre + radius * rotated(OUTLINES[kind], rng.uniform(0, 2 * np.pi)), COLOURS[colour])
        image, labels = canvas.finish()
        names = [f"{colour} {kind}" for colour, kind in zip(colours, kinds, strict=True)]
        return Picture(image, f"{joined(names)} with {ground} background", parts=labels, mask=labels > 0)

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return edges(picture)


def star(points: int, inner: float) -> np.ndarray:
    """The corners, (2 points, 2), of a star with its tips at radius 1 and the corners between them at `inner`."""
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return radii[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


OUTLINES = {"circle": star(36, 1.0), "square": star(2, 1.0), "triangle": star(3, 0.5), "star": star(5, 0.45)}


def rotated(points: np.ndarray, angle: float) -> np.ndarray:
    """Points (N, 2) rotated about the origin: clockwise for positive angles, since y points down."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])
