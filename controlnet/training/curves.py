"""What a run has logged, as curves."""

from array import array
from collections import defaultdict

# Two of them at every step.
KEPT = ("control_measure", "validation_loss", "loss", "iou", "keypoint_distance", "zero_convs", "lr")


def scalars(values: dict) -> dict[str, float]:
    """The numbers of a log line by name, those of a list by name and place; what is no number is left out."""
    numbers = {}
    for name, value in values.items():
        if isinstance(value, list):
            numbers |= {f"{name}/{i}": number for i, number in enumerate(value)}
        elif isinstance(value, int | float) and name != "step":
            numbers[name] = value
    return numbers


class Curve:
    def __init__(self):
        self.steps, self.values = array("q"), array("d")  # a million points take 16 MB

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)


class Curves(defaultdict[str, Curve]):
    def __init__(self):
        super().__init__(Curve)

    def add(self, values: dict) -> None:
        """A line of the log, as far as it is kept."""
        for name, number in scalars({name: values[name] for name in KEPT if name in values}).items():
            self[name].add(values["step"], number)

    def at(self, name: str, step: int) -> float | None:
        """The newest value, if it is that of `step`."""
        curve = self[name]
        return curve.values[-1] if curve.steps and curve.steps[-1] == step else None
