"""Things that are alive, or look so: birds, fish, cats, dogs, snowmen, people."""

from .paint import INK, WOOD, mixed, shade
from .pen import Pen

WHITE, ORANGE, PINK = (255, 255, 255), (244, 146, 50), (244, 158, 168)
SKINS = ((255, 214, 176), (232, 180, 130), (168, 112, 74), (116, 76, 52))
HAIR = ((62, 44, 40), (112, 70, 44), (224, 172, 84), (186, 84, 44), (48, 46, 56))


def eye(pen: Pen, x: float, y: float, radius: float) -> None:
    pen.oval(x, y, radius, 1.15 * radius, WHITE)
    pen.oval(x, y, 0.62 * radius, 0.8 * radius, INK)


def bird(pen: Pen) -> None:
    """In flight."""
    lift = pen.vary(0.76, 0.92)
    # The wing behind, the tail, the body, the belly, the beak, the wing in front.
    pen.blob([(0.08, 0.42), (0.02, 0.6), (0.1, lift - 0.08), (0.22, 0.6), (0.2, 0.42)], pen.dark)
    pen.polygon([(-0.2, 0.34), (-0.52, 0.44), (-0.46, 0.3), (-0.52, 0.2)], pen.dark)
    pen.blob(
        [(-0.34, 0.34), (-0.05, 0.46), (0.18, 0.52), (0.34, 0.44), (0.26, 0.26), (0.02, 0.16), (-0.2, 0.24)], pen.main
    )
    pen.disc(0.29, 0.47, 0.145, pen.main)
    pen.blob([(0.3, 0.34), (0.2, 0.24), (0.0, 0.18), (-0.16, 0.25), (0.04, 0.29), (0.2, 0.34)], pen.light)
    pen.polygon([(0.41, 0.53), (0.56, 0.45), (0.41, 0.4)], ORANGE if pen.main[0] < 225 or pen.main[2] > 120 else WOOD)
    pen.blob(
        [(-0.18, 0.4), (-0.34, 0.6), (-0.32, lift), (-0.12, 0.72), (0.1, 0.42), (-0.02, 0.34)],
        mixed(pen.main, pen.dark, 0.75),
    )
    eye(pen, 0.33, 0.51, 0.05)


def fish(pen: Pen) -> None:
    # Tail and fins, the body, its belly, stripes, the fin at the side.
    pen.polygon([(-0.24, 0.3), (-0.52, 0.53), (-0.44, 0.3), (-0.52, 0.07)], pen.dark)
    pen.blob([(-0.1, 0.48), (-0.02, 0.66), (0.14, 0.62), (0.2, 0.44)], pen.dark)
    pen.blob([(-0.08, 0.14), (-0.06, -0.02), (0.06, 0.02), (0.12, 0.14)], pen.dark)
    pen.blob([
        (-0.3, 0.3), (-0.12, 0.47), (0.14, 0.53), (0.38, 0.43), (0.48, 0.29), (0.36, 0.15), (0.12, 0.08),
        (-0.14, 0.13),
    ], pen.main)  # fmt: skip
    pen.blob([(0.46, 0.27), (0.36, 0.15), (0.12, 0.08), (-0.14, 0.13), (-0.25, 0.24), (0.1, 0.17)], pen.light)
    for x, half in ((-0.08, 0.12), (0.08, 0.165)) if pen.rng.random() < 0.6 else ():
        pen.blob([
            (x - 0.03, 0.31 - half), (x + 0.02, 0.31), (x - 0.03, 0.31 + half), (x + 0.05, 0.31 + half),
            (x + 0.1, 0.31), (x + 0.05, 0.31 - half),
        ], pen.light)  # fmt: skip
    pen.blob([(0.06, 0.3), (-0.08, 0.35), (-0.1, 0.2), (0.04, 0.22)], pen.dark)
    eye(pen, 0.31, 0.36, 0.07)


def cat(pen: Pen) -> None:
    """Sitting."""
    tail = pen.vary(0.35, 0.5)
    # Tail, body, chest and paws.
    pen.curve([(0.14, 0.07), (0.36, 0.08), (0.45, 0.22), (0.37, tail)], 0.1, pen.dark)
    pen.blob(
        [(-0.24, 0.03), (0, 0.0), (0.24, 0.03), (0.27, 0.2), (0.17, 0.45), (0, 0.56), (-0.17, 0.45), (-0.27, 0.2)],
        pen.main,
    )
    pen.oval(0, 0.28, 0.11, 0.17, pen.light)
    for x in (-0.1, 0.1):
        pen.oval(x, 0.05, 0.09, 0.055, pen.light)
    # Ears, head, muzzle, eyes and nose.
    for side in (-1, 1):
        pen.polygon([(side * 0.28, 0.7), (side * 0.27, 1.0), (side * 0.06, 0.85)], pen.main)
        pen.polygon([(side * 0.235, 0.76), (side * 0.235, 0.92), (side * 0.12, 0.83)], PINK)
    pen.oval(0, 0.69, 0.3, 0.22, pen.main)
    if pen.rng.random() < 0.5:  # stripes
        for x in (-0.09, 0, 0.09):
            pen.line([(x, 0.83), (x * 0.8, 0.9)], 0.045, pen.dark)
    pen.oval(0, 0.6, 0.13, 0.09, pen.light)
    for x in (-0.13, 0.13):
        eye(pen, x, 0.72, 0.065)
    pen.polygon([(-0.045, 0.65), (0.045, 0.65), (0, 0.595)], (214, 92, 110))


def dog(pen: Pen) -> None:
    """Standing, seen from the side."""
    patch = pen.rng.random() < 0.5
    # Tail, legs, body.
    pen.curve([(-0.34, 0.45), (-0.46, 0.54), (-0.45, 0.72)], 0.085, pen.dark)
    for x in (-0.25, 0.2):
        pen.box(x - 0.055, 0, x + 0.055, 0.3, pen.dark)
    for x in (-0.34, 0.1):
        pen.box(x - 0.06, 0.02, x + 0.06, 0.3, pen.main)
        pen.oval(x + 0.025, 0.035, 0.085, 0.04, pen.light)
    pen.blob([
        (-0.42, 0.42), (-0.3, 0.52), (0.0, 0.49), (0.14, 0.6), (0.3, 0.5), (0.26, 0.28), (0.1, 0.22),
        (-0.2, 0.24), (-0.38, 0.26),
    ], pen.main)  # fmt: skip
    if patch:
        pen.oval(-0.17, 0.41, 0.11, 0.085, pen.dark)
    # Head, muzzle, nose, ear, collar.
    pen.blob(
        [(0.02, 0.72), (0.1, 0.9), (0.28, 0.92), (0.36, 0.76), (0.54, 0.72), (0.54, 0.6), (0.34, 0.54), (0.14, 0.55)],
        pen.main,
    )
    pen.blob([(0.36, 0.68), (0.54, 0.7), (0.55, 0.6), (0.36, 0.54), (0.26, 0.58)], pen.light)
    pen.oval(0.53, 0.71, 0.055, 0.045, INK)
    pen.blob([(0.06, 0.88), (0.16, 0.86), (0.17, 0.66), (0.06, 0.52), (-0.05, 0.6), (-0.02, 0.76)], pen.dark)
    pen.line(
        [(0.1, 0.52), (0.29, 0.5)], 0.06, (214, 60, 56) if pen.main[0] < 200 or pen.main[1] > 120 else (56, 110, 200)
    )
    eye(pen, 0.29, 0.78, 0.055)


def snowman(pen: Pen) -> None:
    """White, with hat and scarf in the main colour."""
    snow, blue = (250, 250, 252), (206, 220, 236)
    # Arms, the three balls in their shade, buttons, scarf.
    for side in (-1, 1):
        pen.line([(side * 0.2, 0.45), (side * 0.43, 0.58 + 0.06 * side)], 0.035, WOOD)
    for y, radius in ((0.24, 0.27), (0.56, 0.19)):
        pen.disc(0, y, radius, blue)
        pen.disc(-0.035, y + 0.025, 0.88 * radius, snow)
    pen.disc(0, 0.755, 0.15, blue)
    pen.disc(-0.015, 0.765, 0.132, snow)
    for y in (0.2, 0.34):
        pen.disc(0, y, 0.03, INK)
    pen.line([(-0.13, 0.655), (0.13, 0.655)], 0.075, pen.main)
    pen.polygon([(0.06, 0.66), (0.15, 0.64), (0.17, 0.42), (0.07, 0.42)], pen.dark)
    # Eyes, carrot, hat.
    for x in (-0.06, 0.06):
        pen.disc(x, 0.795, 0.026, INK)
    pen.polygon([(-0.01, 0.765), (-0.01, 0.715), (0.16, 0.735)], ORANGE)
    pen.box(-0.13, 0.88, 0.13, 1.03, pen.main)
    pen.box(-0.13, 0.89, 0.13, 0.93, pen.dark)
    pen.line([(-0.19, 0.87), (0.19, 0.87)], 0.04, pen.main)


def person(pen: Pen) -> None:
    """The main colour is that of the shirt or dress."""
    skin = SKINS[pen.rng.integers(len(SKINS))]
    hair = HAIR[pen.rng.integers(len(HAIR))]
    dress, waving, long = pen.rng.random(3) < (0.4, 0.4, 0.4)
    if long:
        pen.blob([(-0.19, 0.84), (0, 1.0), (0.19, 0.84), (0.2, 0.58), (0, 0.56), (-0.2, 0.58)], hair)
    # Legs and shoes, arms and hands; what is worn; the face.
    for side in (-1, 1):
        pen.box(side * 0.085 - 0.055, 0.03, side * 0.085 + 0.055, 0.32, skin if dress else (70, 76, 108))
        pen.oval(side * 0.1, 0.03, 0.085, 0.04, INK)
        hand = (side * 0.32, 0.74) if waving and side > 0 else (side * 0.26, 0.3)
        pen.line([(side * 0.13, 0.53), (side * 0.25, 0.56 if hand[1] > 0.5 else 0.42), hand], 0.085, pen.dark)
        pen.disc(*hand, 0.055, skin)
    if dress:
        pen.blob([(-0.27, 0.18), (0, 0.15), (0.27, 0.18), (0.13, 0.5), (0.1, 0.6), (-0.1, 0.6), (-0.13, 0.5)], pen.main)
    else:
        pen.box(-0.145, 0.24, 0.145, 0.36, (70, 76, 108))
        pen.blob(
            [(-0.15, 0.31), (0, 0.3), (0.15, 0.31), (0.17, 0.52), (0.1, 0.61), (-0.1, 0.61), (-0.17, 0.52)], pen.main
        )
    pen.disc(0, 0.78, 0.18, skin)
    pen.blob([
        (-0.19, 0.78), (-0.17, 0.92), (0, 0.99), (0.17, 0.92), (0.19, 0.78), (0.12, 0.87), (-0.04, 0.88),
        (-0.13, 0.85),
    ], hair)  # fmt: skip
    for x in (-0.065, 0.065):
        pen.oval(x, 0.77, 0.024, 0.032, INK)
    pen.curve([(-0.05, 0.695), (0, 0.675), (0.05, 0.695)], 0.024, shade((200, 70, 70), 0.1))
