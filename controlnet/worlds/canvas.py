"""A canvas to draw plain figures on, which remembers at each pixel what was drawn there last."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4

RGB = tuple[int, int, int]
Points = np.ndarray | Sequence[tuple[float, float]]  # (N, 2)


class Canvas:
    """An image of plain colours, drawn at four times its size; coordinates are fractions of its side, y points down.

    What is drawn carries the `label` (1 to 255) of that moment; the ground is 0.
    """

    def __init__(self, size: int, ground: RGB | np.ndarray):
        """`ground` is a colour, or an image (H, 1, 3) of colours from top to bottom."""
        self.size, self.side, self.label = size, size * SUPERSAMPLING, 1
        if isinstance(ground, np.ndarray):
            self.image = Image.fromarray(ground).resize((self.side, self.side), Image.Resampling.BILINEAR)
        else:
            self.image = Image.new("RGB", (self.side, self.side), ground)
        self.labels = Image.new("L", (self.side, self.side))
        self.brush, self.marker = ImageDraw.Draw(self.image), ImageDraw.Draw(self.labels)

    def polygon(self, corners: np.ndarray, colour: RGB) -> None:
        points = (corners * self.side).ravel().tolist()
        self.brush.polygon(points, colour)
        self.marker.polygon(points, self.label)

    def disc(self, centre: np.ndarray, radius: float | np.ndarray, colour: RGB) -> None:
        """Also an upright ellipse, with two radii."""
        box = [*((centre - radius) * self.side).tolist(), *((centre + radius) * self.side).tolist()]
        self.brush.ellipse(box, colour)
        self.marker.ellipse(box, self.label)

    def limb(self, joints: np.ndarray | tuple[np.ndarray, ...], width: float, colour: RGB) -> None:
        """A line with rounded corners and ends."""
        points = (np.asarray(joints) * self.side).ravel().tolist()
        self.brush.line(points, colour, round(width * self.side))
        self.marker.line(points, self.label, round(width * self.side))
        for joint in joints:
            self.disc(joint, width / 2, colour)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """-> anti-aliased image, uint8 (H, W, 3), and labels, uint8 (H, W): what lies at each pixel's middle."""
        middles = slice(SUPERSAMPLING // 2, None, SUPERSAMPLING)
        return np.array(self.image.reduce(SUPERSAMPLING)), np.array(self.labels)[middles, middles]


# Catmull-Rom: the curve from the second to the third of four points, at six positions.
T = np.arange(6)[:, None] / 6
SPLINE = (np.concatenate([T**0, T, T**2, T**3], axis=1) / 2) @ np.array(
    [[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]
)  # (6, 4)


def closed_curve(points: Points) -> np.ndarray:
    """Corners (6 N, 2) of a smooth figure whose outline runs through the points."""
    return splines(np.asarray([points[-1], *points, *points[:2]]))


def open_curve(points: Points) -> np.ndarray:
    """Joints (6 N - 5, 2) of a smooth line through the points."""
    return np.concatenate([splines(np.asarray([points[0], *points, points[-1]])), points[-1:]])


def splines(points: np.ndarray) -> np.ndarray:
    """(N + 3, 2) -> (6 N, 2): from the second point to the second to last."""
    near = np.stack([points[i : len(points) - 3 + i] for i in range(4)])  # (4, N, 2)
    return np.einsum("tk,knd->ntd", SPLINE, near).reshape(-1, 2)
