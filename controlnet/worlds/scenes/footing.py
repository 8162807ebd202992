"""What a thing stands on: its shadow, at sea an island, and on land a pond for what swims."""

import numpy as np

from ..canvas import Canvas
from .layers import Layers
from .layout import Placed
from .paint import mixed
from .setting import GROUNDS, Setting

WHITE, SHADOW = (255, 255, 255), (30, 40, 90)


def draw_footing(canvas: Canvas, layers: Layers, setting: Setting, thing: Placed) -> None:
    """Nothing for what flies. Layers on the ground have the ground's depth."""
    kind, half = thing.kind, thing.kind.width * thing.scale / 2
    foot, shadow = np.array([thing.x, thing.y]), np.array([0.94 * half, 0.05 * thing.scale + 0.004])
    at_sea = setting.ground == "sea" or thing.y < setting.shore
    water, sand = setting.lit(GROUNDS["sea"]), setting.lit(GROUNDS["sand"])
    if kind.home == "sea":
        if not at_sea:
            layers.start("water")
            high = kind.height * thing.scale if kind.name == "fish" else 0.0  # a fish is seen in it, a boat on it
            canvas.disc(foot - [0, 0.5 * high], np.array([1.25 * half, max(0.2 * half, 0.72 * high)]), water)
        if kind.name != "fish":
            layers.start("sea" if at_sea else "water")
            canvas.disc(foot, shadow, mixed(water, WHITE, 0.3))
    elif kind.home == "land":
        if at_sea:
            island = np.array([1.2 * half, 0.24 * half + 0.01])
            layers.start("sea")
            canvas.disc(foot + [0, 0.012], island + [0.02, 0.005], mixed(water, WHITE, 0.35))
            layers.start("sand")
            canvas.disc(foot, island, sand)
        else:
            layers.start(setting.ground)
        canvas.disc(foot, shadow, mixed(sand if at_sea else setting.ground_colour, SHADOW, 0.22))
