"""What a thing is drawn with: figures in coordinates of its own, in its own colours."""

from collections.abc import Sequence

import numpy as np

from ..canvas import RGB, Canvas, Points, closed_curve, open_curve
from .paint import GLASS, LAMP, shade, tint


class Pen:
    """Draws on a canvas with the origin at the middle of the thing's foot, y up, in units of its size.

    `main`, `dark` and `light` are its main colour's tones; `rng` is for what varies from one such thing to the next.
    """

    def __init__(
        self, canvas: Canvas, foot: tuple[float, float], scale: float, main: RGB, rng: np.random.Generator, night: bool
    ):
        self.canvas, self.foot, self.rng = canvas, np.array(foot), rng
        self.axes = scale * np.array([rng.choice([-1, 1]), -1])  # mirrored half the time
        self.main, self.dark, self.light = main, shade(main), tint(main)
        self.glass = LAMP if night else GLASS

    def vary(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def unlike(self, colours: Sequence[RGB], least: float = 60) -> list[RGB]:
        """Those of the colours that can be told from the main one."""
        return [colour for colour in colours if np.linalg.norm(np.subtract(colour, self.main)) > least]

    def placed(self, points: Points) -> np.ndarray:
        return self.foot + np.asarray(points) * self.axes

    def polygon(self, points: Points, colour: RGB) -> None:
        self.canvas.polygon(self.placed(points), colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def blob(self, points: Points, colour: RGB) -> None:
        """A smooth closed figure."""
        self.polygon(closed_curve(points), colour)

    def oval(self, x: float, y: float, across: float, up: float, colour: RGB) -> None:
        self.canvas.disc(self.placed((x, y)), np.abs(self.axes) * (across, up), colour)

    def disc(self, x: float, y: float, radius: float, colour: RGB) -> None:
        self.oval(x, y, radius, radius, colour)

    def line(self, points: Points, width: float, colour: RGB) -> None:
        self.canvas.limb(self.placed(points), width * abs(self.axes[1]), colour)

    def curve(self, points: Points, width: float, colour: RGB) -> None:
        """A smooth line."""
        self.line(open_curve(points), width, colour)
