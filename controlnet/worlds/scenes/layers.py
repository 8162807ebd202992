"""The layers of a scene in the order in which they were drawn, which turn a canvas's labels into maps."""

from dataclasses import dataclass

import numpy as np

from ..canvas import Canvas
from ..classes import CLASSES
from ..world import Thing, Truth
from .layout import Placed, depth_at
from .setting import Setting


@dataclass(frozen=True)
class Layer:
    """`depth` is None for the ground, which comes nearer towards the bottom; `thing` is -1 for all but things."""

    kind: str
    depth: float | None
    thing: int = -1


class Layers:
    """Each layer has a label of its own on the canvas: its number, from the sky, which is 0."""

    def __init__(self, canvas: Canvas):
        self.canvas, self.layers = canvas, [Layer("sky", 1.0)]
        canvas.label = 0

    def start(self, kind: str, depth: float | None = None, thing: int = -1) -> None:
        """What is drawn from now on is a new layer."""
        self.canvas.label = len(self.layers)
        self.layers.append(Layer(kind, depth, thing))

    def truth(self, labels: np.ndarray, setting: Setting, things: list[Placed]) -> Truth:
        """The maps of a drawing with these labels (H, W)."""
        rows = (np.arange(len(labels)) + 0.5) / len(labels)
        depth = np.array([np.nan if layer.depth is None else layer.depth for layer in self.layers])[labels]
        return Truth(
            classes=np.array([CLASSES.index(layer.kind) for layer in self.layers], np.uint8)[labels],
            objects=np.array([layer.thing for layer in self.layers], np.int8)[labels],
            depth=np.where(np.isnan(depth), depth_at(setting, rows)[:, None], depth).astype(np.float32),
            things=tuple(Thing(thing.kind.name, thing.colour, thing.size, thing.place) for thing in things),
            sky=setting.sky,
            ground=setting.ground,
            far=setting.far,
        )
