"""`scenes`: small flat illustrations of twenty kinds of things in a landscape."""

import numpy as np

from ..canvas import Canvas
from ..world import Sample, World, edges
from .backdrop import draw_backdrop, sky_gradient
from .captions import caption
from .layers import Layers
from .layout import Placed, random_things
from .paint import PAINTS, mixed
from .pen import Pen
from .setting import GROUNDS, Setting, random_setting


class Scenes(World):
    """Captions: 'a red house under a night sky', 'large blue boat on the left, small white bird, sunset, sea' ..."""

    name = "scenes"

    def __getitem__(self, index: int) -> Sample:
        rng = self.rng(index)
        setting = random_setting(rng)
        things = random_things(rng, setting, tuple(name for name in PAINTS if name in self.colours))
        (image, labels), layers = draw_scene(self.size, setting, things, rng)
        is_thing = np.array([layer.thing >= 0 for layer in layers.layers])
        return Sample(image, edges(image), caption(rng, setting, things), is_thing[labels])


def draw_scene(size: int, setting: Setting, things: list[Placed], rng: np.random.Generator):
    canvas = Canvas(size, sky_gradient(setting))
    layers = Layers(canvas)
    draw_backdrop(canvas, layers, setting, rng)
    for number, thing in enumerate(things):
        draw_footing(canvas, layers, setting, thing)
        layers.start(thing.kind.name, thing.depth, number)
        pen = Pen(canvas, (thing.x, thing.y), thing.scale, PAINTS[thing.colour], rng, setting.sky == "night")
        thing.kind.draw(pen)
    return canvas.finish(), layers


def draw_footing(canvas: Canvas, layers: Layers, setting: Setting, thing: Placed) -> None:
    """A shadow, or an island at sea, or a pond on land."""
    kind = thing.kind
    if kind.home == "sky" or thing.y < setting.horizon + 0.01:
        return
    foot, half = np.array([thing.x, thing.y]), kind.width * thing.scale / 2
    at_sea = setting.ground == "sea" or thing.y < setting.shore
    water, sand = setting.lit(GROUNDS["sea"]), setting.lit(GROUNDS["sand"])
    if kind.home == "sea" and not at_sea:
        layers.start("sea", thing.depth)
        middle = foot - [0, 0.5 * kind.height * thing.scale if kind.name == "fish" else 0.0]
        up = max(0.2 * half, 0.72 * kind.height * thing.scale if kind.name == "fish" else 0.0)
        canvas.disc(middle, np.array([1.25 * half, up]), water)
    elif kind.home == "land" and at_sea:
        layers.start("sand", thing.depth)
        canvas.disc(
            foot + [0, 0.012], np.array([1.2 * half + 0.02, 0.24 * half + 0.015]), mixed(water, (255, 255, 255), 0.35)
        )
        canvas.disc(foot, np.array([1.2 * half, 0.24 * half + 0.01]), sand)
    if kind.name == "fish":
        return
    layers.start("sea" if kind.home == "sea" else "sand" if at_sea else setting.ground, thing.depth)
    base = water if kind.home == "sea" else sand if at_sea else setting.ground_colour
    tone = mixed(base, (255, 255, 255), 0.3) if kind.home == "sea" else mixed(base, (30, 40, 90), 0.22)
    canvas.disc(foot, np.array([0.94 * half, 0.05 * thing.scale + 0.004]), tone)
