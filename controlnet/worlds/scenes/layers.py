"""What is drawn in which order."""

from dataclasses import dataclass

from ..canvas import Canvas


@dataclass(frozen=True)
class Layer:
    kind: str
    depth: float | None = None
    thing: int = -1


class Layers:
    """Gives what is drawn from now on a label of its own."""

    def __init__(self, canvas: Canvas):
        self.canvas, self.layers = canvas, [Layer("sky", 1.0)]

    def start(self, kind: str, depth: float | None = None, thing: int = -1) -> None:
        self.canvas.label = len(self.layers)
        self.layers.append(Layer(kind, depth, thing))
