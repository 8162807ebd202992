"""Things that travel: cars, boats, rockets, hot-air balloons."""

import numpy as np

from .paint import CREAM, INK, LAMP, STONE, WOOD, mixed, shade, tint
from .pen import Pen


def car(pen: Pen) -> None:
    roof, back = pen.vary(0.54, 0.62), pen.vary(-0.36, -0.28)
    # The cabin and its windows, the body, its lights, the wheels.
    pen.blob([(back - 0.06, 0.3), (back + 0.06, roof - 0.04), (-0.05, roof), (0.12, roof - 0.02), (0.3, 0.3)], pen.main)
    pen.polygon([(back + 0.04, 0.33), (back + 0.11, roof - 0.07), (-0.05, roof - 0.06), (-0.05, 0.33)], pen.glass)
    pen.polygon([(0.0, 0.33), (0.0, roof - 0.06), (0.1, roof - 0.07), (0.22, 0.33)], pen.glass)
    pen.blob(
        [(-0.49, 0.14), (-0.5, 0.26), (-0.42, 0.34), (0, 0.345), (0.34, 0.33), (0.48, 0.26), (0.5, 0.13), (0, 0.1)],
        pen.main,
    )
    pen.box(-0.47, 0.1, 0.48, 0.17, pen.dark)
    pen.oval(0.45, 0.25, 0.035, 0.04, LAMP)
    pen.box(-0.49, 0.22, -0.44, 0.28, (226, 84, 60))
    for x in (-0.27, 0.28):
        pen.disc(x, 0.11, 0.125, INK)
        pen.disc(x, 0.11, 0.06, (206, 208, 214))


def boat(pen: Pen) -> None:
    """A sailing boat."""
    sail = CREAM if pen.rng.random() < 0.7 or sum(pen.main) > 660 else pen.light
    top = pen.vary(0.9, 1.0)
    # Mast, sails, pennant, hull.
    pen.line([(0, 0.2), (0, top)], 0.035, WOOD)
    pen.polygon([(0.035, 0.27), (0.035, top - 0.03), (0.2, 0.5), (0.4, 0.27)], sail)
    pen.polygon([(-0.035, 0.3), (-0.035, top - 0.08), (-0.3, 0.3)], shade(sail, 0.14))
    pen.polygon([(0, top), (0, top - 0.09), (-0.14, top - 0.045)], pen.main)
    pen.blob([(-0.48, 0.24), (-0.2, 0.225), (0.2, 0.225), (0.5, 0.26), (0.34, 0.02), (0, 0.0), (-0.34, 0.02)], pen.main)
    pen.polygon([(-0.4, 0.11), (0.43, 0.11), (0.33, 0.02), (0, 0.0), (-0.33, 0.02)], pen.dark)
    pen.polygon([(-0.45, 0.235), (0.47, 0.245), (0.45, 0.2), (-0.43, 0.19)], pen.light)


def rocket(pen: Pen) -> None:
    """In flight."""
    wide = pen.vary(0.17, 0.21)
    # Flame, fins, nozzle, the body and its shade, nose, band, window.
    pen.blob([(-0.12, 0.16), (0.12, 0.16), (0.07, 0.05), (0, -0.06), (-0.07, 0.05)], (246, 150, 50))
    pen.blob([(-0.06, 0.16), (0.06, 0.16), (0, 0.0)], (255, 222, 110))
    for side in (-1, 1):
        fin = [
            (side * wide * 0.75, 0.46),
            (side * (wide + 0.14), 0.26),
            (side * (wide + 0.14), 0.02),
            (side * 0.1, 0.17),
        ]
        pen.polygon(fin, pen.dark if side > 0 else mixed(pen.main, pen.dark, 0.5))
    body = [(0, 1.0), (wide * 0.75, 0.8), (wide, 0.55), (wide * 0.9, 0.32), (wide * 0.62, 0.16), (0, 0.14)]
    nozzle = [(-0.11, 0.18), (0.11, 0.18), (0.08, 0.1), (-0.08, 0.1)]
    pen.polygon(nozzle, STONE)
    white = CREAM if sum(pen.main) < 660 else (200, 204, 214)
    pen.blob([*body, *[(-x, y) for x, y in body[-2:0:-1]]], white)
    pen.blob([
        (wide * 0.4, 0.9), (wide * 0.75, 0.8), (wide, 0.55), (wide * 0.9, 0.32), (wide * 0.6, 0.16),
        (wide * 0.5, 0.5),
    ], shade(white, 0.14))  # fmt: skip
    nose = [(0, 1.0), (wide * 0.45, 0.9), (wide * 0.82, 0.76), (0, 0.73)]
    pen.blob([*nose, (-wide * 0.82, 0.76), (-wide * 0.45, 0.9)], pen.main)
    pen.box(-wide * 0.84, 0.27, wide * 0.84, 0.4, pen.main)
    pen.disc(0, 0.57, 0.105, pen.main)
    pen.disc(0, 0.57, 0.07, pen.glass)


def balloon(pen: Pen) -> None:
    """A hot-air balloon."""
    wide = pen.vary(0.34, 0.39)
    # Ropes, the envelope's stripes and its shade, the basket.
    for x in (-0.08, 0.08):
        pen.line([(x, 0.12), (1.7 * x, 0.32)], 0.025, WOOD)
    stripes = ((1.0, pen.main), (0.68, CREAM if sum(pen.main) < 640 else tint(STONE, 0.2)), (0.34, pen.main))
    for share, colour in stripes:
        angles = np.linspace(-0.22 * np.pi, 1.22 * np.pi, 25)
        outline = [(share * wide * np.cos(a), 0.64 + 0.36 * np.sin(a)) for a in angles]
        outline += [(-share * 0.1, 0.27), (share * 0.1, 0.27)]
        pen.polygon(outline, colour)
    shaded = [(wide * np.cos(a), 0.64 + 0.36 * np.sin(a)) for a in np.linspace(-0.22 * np.pi, 0.42 * np.pi, 12)]
    inner = [(0.8 * wide * np.cos(a), 0.64 + 0.36 * np.sin(a)) for a in np.linspace(0.42 * np.pi, -0.22 * np.pi, 12)]
    pen.polygon([*shaded, *inner, (0.08, 0.27), (0.1, 0.27)], pen.dark)
    pen.box(-0.1, 0.0, 0.1, 0.14, WOOD)
    pen.box(-0.115, 0.11, 0.115, 0.155, shade(WOOD, 0.3))
