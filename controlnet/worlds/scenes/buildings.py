"""Things that people build: houses, castles, windmills, lighthouses, tents, umbrellas."""

from itertools import pairwise

import numpy as np

from ..canvas import RGB, Points
from .paint import CREAM, INK, LAMP, STONE, WOOD, mixed, shade
from .pen import Pen

ROOFS = ((166, 74, 58), (92, 84, 104), (120, 76, 60), (70, 96, 120))
DOORS = (WOOD, CREAM)


def one_of(pen: Pen, colours: tuple[RGB, ...]) -> RGB:
    """One of the colours that can be told from the main one."""
    unlike = pen.unlike(colours, 90)
    return unlike[pen.rng.integers(len(unlike))]


def house(pen: Pen) -> None:
    half, eaves, top = pen.vary(0.34, 0.42), pen.vary(0.42, 0.5), pen.vary(0.86, 0.98)
    roof, door = one_of(pen, ROOFS), one_of(pen, DOORS)
    # Chimney, wall and its shade, roof, door, windows.
    pen.box(0.17, 0.6, 0.29, top, shade(roof))
    pen.box(-half, 0, half, eaves + 0.03, pen.main)
    pen.box(half * 0.62, 0, half, eaves + 0.03, pen.dark)
    pen.polygon([(-half - 0.09, eaves), (-0.06, top), (0.06, top), (half + 0.09, eaves)], roof)
    pen.box(-half, eaves - 0.035, half, eaves, pen.dark)
    pen.box(-half + 0.07, 0, -half + 0.27, 0.32, door)
    pen.box(0.0, 0.15, 0.2, 0.33, CREAM)
    pen.box(0.025, 0.17, 0.175, 0.31, pen.glass)
    pen.disc(0, (eaves + top) / 2 - 0.02, 0.075, CREAM)
    pen.disc(0, (eaves + top) / 2 - 0.02, 0.05, pen.glass)


def castle(pen: Pen) -> None:
    roof = one_of(pen, ROOFS)
    keep, side = pen.vary(0.6, 0.68), pen.vary(0.4, 0.48)
    # The keep behind, the wall with its merlons, towers at the sides, the gate.
    pen.box(-0.15, 0.3, 0.15, keep, pen.dark)
    pen.polygon([(-0.2, keep), (0, 1), (0.2, keep)], roof)
    pen.box(-0.04, keep - 0.15, 0.04, keep - 0.05, pen.glass)
    pen.box(-0.32, 0, 0.32, 0.36, pen.main)
    for x in (-0.24, -0.08, 0.08, 0.24):
        pen.box(x - 0.05, 0.36, x + 0.05, 0.43, pen.main)
    for x in (-0.37, 0.37):
        pen.box(x - 0.12, 0, x + 0.12, side, pen.light)
        pen.box(x + 0.04, 0, x + 0.12, side, pen.main)
        pen.polygon([(x - 0.16, side), (x, side + 0.3), (x + 0.16, side)], roof)
        pen.box(x - 0.045, side - 0.17, x + 0.045, side - 0.06, pen.glass)
    pen.disc(0, 0.16, 0.11, INK)
    pen.box(-0.11, 0, 0.11, 0.16, INK)


def windmill(pen: Pen) -> None:
    cap = one_of(pen, ROOFS)
    # The tower and its shade, the cap, door and window, sails.
    pen.polygon([(-0.25, 0), (0.25, 0), (0.15, 0.6), (-0.15, 0.6)], pen.main)
    pen.polygon([(0.08, 0), (0.25, 0), (0.15, 0.6), (0.06, 0.6)], pen.dark)
    pen.blob([(-0.18, 0.59), (0.18, 0.59), (0.13, 0.72), (0, 0.78), (-0.13, 0.72)], cap)
    pen.box(-0.08, 0, 0.08, 0.2, one_of(pen, DOORS))
    pen.disc(0, 0.35, 0.06, pen.glass)
    hub = np.array([0, 0.63])
    for angle in pen.vary(0.3, 1.2) + np.arange(4) * np.pi / 2:
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        sail = [hub + a * along + b * across for a, b in ((0.09, 0.0), (0.38, 0.0), (0.38, 0.13), (0.09, 0.13))]
        pen.polygon(np.array(sail), CREAM)
        pen.line(np.array([hub, hub + 0.4 * along]), 0.035, WOOD)
    pen.disc(0, 0.63, 0.055, WOOD)


def lighthouse(pen: Pen) -> None:
    for i, low in enumerate(np.linspace(0, 0.56, 5)):  # stripes of a tower that narrows
        wide, narrow, colour = 0.2 - 0.1 * low, 0.2 - 0.1 * (low + 0.14), CREAM if i % 2 else pen.main
        for left, tone in ((-1.0, colour), (0.35, shade(colour, 0.15))):
            pen.polygon([(left * wide, low), (wide, low), (narrow, low + 0.14), (left * narrow, low + 0.14)], tone)
    pen.box(-0.17, 0.69, 0.17, 0.74, INK)
    pen.box(-0.09, 0.74, 0.09, 0.86, LAMP)
    pen.box(-0.02, 0.74, 0.02, 0.86, INK)
    pen.polygon([(-0.14, 0.86), (0, 1), (0.14, 0.86)], pen.main)
    pen.box(-0.065, 0, 0.065, 0.13, INK)


def tent(pen: Pen) -> None:
    top = pen.vary(0.58, 0.66)
    # Pole, the side, the front, the entrance and its flaps.
    pen.line([(-0.2, top + 0.07), (-0.12, top - 0.1)], 0.03, WOOD)
    pen.polygon([(-0.15, top), (0.28, top - 0.04), (0.5, 0), (0.16, 0)], pen.dark)
    pen.polygon([(-0.5, 0), (-0.15, top), (0.2, 0)], pen.main)
    pen.polygon([(-0.31, 0), (-0.15, top * 0.72), (0.02, 0)], INK)
    pen.polygon([(-0.15, top * 0.72), (0.02, 0), (0.1, 0)], pen.light)
    pen.polygon([(-0.15, top * 0.72), (-0.31, 0), (-0.38, 0)], pen.light)


def umbrella(pen: Pen) -> None:
    """A parasol, as on beaches: five gores between six ribs, which bend from the tip to the rim."""
    lean = pen.vary(0.05, 0.15)
    white = CREAM if sum(pen.main) < 660 else STONE

    def leant(points: Points) -> list[tuple[float, float]]:
        return [(x + lean * y, y - lean * x) for x, y in points]

    pen.line(leant([(0, 0), (0, 0.92)]), 0.045, WOOD)
    pen.disc(*leant([(0, 0.96)])[0], 0.035, WOOD)
    ribs = np.linspace(-0.5, 0.5, 6)
    bend = np.linspace(0, np.pi / 2, 6)
    for i, (left, right) in enumerate(pairwise(ribs)):
        down = [(left * np.sin(a), 0.52 + 0.42 * np.cos(a)) for a in bend]
        rim = [(x, 0.52 + 0.035 * np.sin(np.pi * k / 4)) for k, x in enumerate(np.linspace(left, right, 5))]
        up = [(right * np.sin(a), 0.52 + 0.42 * np.cos(a)) for a in bend[::-1]]
        colour = white if i % 2 else pen.main if i < 3 else mixed(pen.main, pen.dark, 0.6)
        pen.polygon(leant([*down, *rim, *up]), colour)
