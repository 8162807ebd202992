"""`scenes`: small flat illustrations of twenty kinds of things in a landscape; the hint is their Canny edges."""

import numpy as np

from ..canvas import Canvas
from ..hints import edges
from ..world import Picture, World
from .backdrop import draw_backdrop, draw_footing, sky_gradient
from .captions import caption
from .layers import Layers
from .layout import Placed, random_things
from .paint import PAINTS
from .pen import Pen
from .setting import Setting, random_setting


class Scenes(World):
    """Captions: 'a red house under a night sky', 'large blue boat on the left, small white bird, sunset, sea' ...

    The colours are a dozen of its own (paint.py), whatever `colours` says.
    """

    name = "scenes"

    def draw(self, index: int) -> Picture:
        rng = self.rng(index)
        setting = random_setting(rng)
        return draw_scene(self.size, setting, random_things(rng, setting), rng)

    def hint(self, index: int, picture: Picture) -> np.ndarray:
        return edges(picture)


def draw_scene(
    size: int, setting: Setting, things: list[Placed], rng: np.random.Generator, apart: bool = False
) -> Picture:
    """`things` are drawn in their order, from far to near; `rng` is for what neither they nor the setting say.

    With `apart` sky, land and each thing have random numbers of their own, so that a change of one changes no other.
    """
    sky_rng, land_rng, *rngs = rng.spawn(2 + len(things)) if apart else [rng] * (2 + len(things))
    canvas = Canvas(size, sky_gradient(setting))
    layers = Layers(canvas)
    draw_backdrop(canvas, layers, setting, sky_rng, land_rng)
    for number, (thing, thing_rng) in enumerate(zip(things, rngs, strict=True)):
        draw_footing(canvas, layers, setting, thing)
        layers.start(thing.kind.name, thing.depth, number)
        foot, night = (thing.x, thing.y), setting.sky == "night"
        thing.kind.draw(Pen(canvas, foot, thing.scale, PAINTS[thing.colour], thing_rng, night))
    image, labels = canvas.finish()
    truth = layers.truth(labels, setting, things)
    words = caption(rng, setting, things)
    return Picture(image, words, parts=truth.classes, mask=truth.objects >= 0, truth=truth)
