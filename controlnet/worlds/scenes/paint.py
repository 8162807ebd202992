"""The colours of the scenes: a dozen that people name, softer than CSS's, and what is made of them."""

from ..canvas import RGB

PAINTS: dict[str, RGB] = {
    "red": (216, 58, 52),
    "orange": (242, 138, 42),
    "yellow": (250, 210, 64),
    "green": (70, 152, 78),
    "teal": (36, 156, 156),
    "blue": (52, 108, 204),
    "purple": (132, 80, 176),
    "pink": (246, 146, 180),
    "brown": (140, 90, 56),
    "white": (248, 246, 240),
    "gray": (150, 154, 162),
    "black": (50, 48, 58),
}

INK, CREAM, WOOD, LEAF, STONE = (44, 40, 52), (250, 240, 218), (122, 82, 56), (66, 140, 72), (112, 116, 128)
GLASS, LAMP = (186, 224, 242), (255, 226, 120)  # windows by day and at night


def mixed(a: RGB, b: RGB, share: float) -> RGB:
    """`share` of b in a."""
    return tuple(round(x + share * (y - x)) for x, y in zip(a, b, strict=True))


def shade(colour: RGB, share: float = 0.22) -> RGB:
    """Darker, towards a cool black; black itself becomes lighter."""
    return mixed(colour, (30, 26, 60) if sum(colour) > 220 else (150, 150, 170), share)


def tint(colour: RGB, share: float = 0.35) -> RGB:
    """Lighter."""
    return mixed(colour, (255, 252, 244), share)
