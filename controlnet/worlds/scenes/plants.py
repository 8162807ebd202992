"""Things that grow: trees, pines, flowers, mushrooms."""

import numpy as np

from .paint import CREAM, LEAF, WOOD, mixed, shade, tint
from .pen import Pen

CROWNS = (
    ((0, 0.66, 0.33),),
    ((-0.2, 0.58, 0.22), (0.2, 0.58, 0.22), (0, 0.74, 0.25)),
    ((0, 0.5, 0.28), (0, 0.68, 0.25), (0, 0.84, 0.16)),
    ((-0.24, 0.54, 0.19), (0.24, 0.54, 0.19), (-0.12, 0.76, 0.2), (0.14, 0.76, 0.2), (0, 0.6, 0.22)),
)


def tree(pen: Pen) -> None:
    trunk = pen.unlike([WOOD, shade(WOOD, 0.5)])[0]
    pen.polygon([(-0.09, 0), (0.09, 0), (0.055, 0.5), (-0.055, 0.5)], trunk)
    pen.line([(0, 0.3), (0.13, 0.48)], 0.05, trunk)
    crown = CROWNS[pen.rng.integers(len(CROWNS))]
    for tone, dx, dy, grown in ((pen.dark, 0, 0, 1.0), (pen.main, -0.035, 0.03, 0.88)):
        for x, y, radius in crown:
            pen.disc(x + dx, y + dy, radius * grown, tone)
    x, y, radius = crown[0] if len(crown) == 1 else crown[-2]
    pen.disc(x - 0.4 * radius, y + 0.38 * radius, 0.26 * radius, mixed(pen.main, pen.light, 0.5))


def pine(pen: Pen) -> None:
    trunk = pen.unlike([WOOD, shade(WOOD, 0.5)])[0]
    pen.box(-0.06, 0, 0.06, 0.2, trunk)
    wide = pen.vary(0.3, 0.38)
    for low, high, half in ((0.14, 0.56, wide), (0.36, 0.78, 0.8 * wide), (0.58, 1.0, 0.58 * wide)):
        pen.polygon([(-half, low), (0, high), (half, low)], pen.main)
        pen.polygon([(half * 0.15, low), (0, high), (half, low)], pen.dark)


def flower(pen: Pen) -> None:
    heart = (250, 206, 70) if pen.main[2] > 110 or pen.main[1] < 110 else WOOD
    stem = pen.unlike([LEAF, shade(LEAF, 0.4)])[0]
    sway = pen.vary(-0.05, 0.05)
    pen.curve([(0, 0), (sway, 0.25), (0, 0.6)], 0.055, stem)
    pen.blob([(0, 0.1), (0.14, 0.13), (0.3, 0.28), (0.13, 0.27)], stem)
    pen.blob([(0, 0.05), (-0.12, 0.07), (-0.27, 0.2), (-0.12, 0.2)], stem)
    count, turn = int(pen.rng.integers(5, 8)), pen.vary(0, 1)
    for between, reach, radius, tone in ((0.5, 0.19, 0.1, pen.dark), (0.0, 0.18, 0.125, pen.main)):
        for i in range(count):  # petals
            angle = turn + (2 * np.pi / count) * (i + between)
            pen.disc(reach * np.cos(angle), 0.69 + reach * np.sin(angle), radius, tone)
    pen.disc(0, 0.69, 0.12, heart)
    pen.disc(-0.02, 0.71, 0.07, tint(heart, 0.3))


def mushroom(pen: Pen) -> None:
    stem, spots = (CREAM, CREAM) if pen.unlike([CREAM]) else (tint(WOOD, 0.6), tint(WOOD, 0.4))
    pen.blob([(-0.15, 0.02), (0, -0.01), (0.15, 0.02), (0.12, 0.25), (0.13, 0.48), (-0.13, 0.48), (-0.12, 0.25)], stem)
    pen.polygon([(0.05, 0.01), (0.15, 0.02), (0.11, 0.25), (0.12, 0.45), (0.04, 0.45)], shade(stem, 0.12))
    low, high = 0.44, pen.vary(0.84, 0.92)  # of the cap
    arc = [(0.46 * np.cos(a), low + (high - low) * np.sin(a)) for a in np.linspace(0, np.pi, 17)]
    rim = [(-0.38, low - 0.06), (0, low - 0.1), (0.38, low - 0.06)]
    pen.blob([*arc[::2], *rim], pen.dark)
    pen.polygon([*arc, (-0.3, low + 0.02), (0, low - 0.01), (0.3, low + 0.02)], pen.main)
    for x, y, radius in ((-0.22, 0.25, 0.085), (0.03, 0.62, 0.1), (0.24, 0.28, 0.075), (0.0, 0.22, 0.06)):
        pen.oval(x, low + y * (high - low), radius, 0.85 * radius, mixed(spots, (255, 255, 255), 0.3))
