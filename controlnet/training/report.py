"""A run as a page: OUT/report.html, its curves drawn in it and its grids beside it, without any script."""

from array import array
from collections import defaultdict
from html import escape
from typing import NamedTuple

import numpy as np

from .charts import Points, chart
from .run_state import RunFolder, write_text

RELOADED = 30  # seconds
MOST_POINTS = 300  # of a curve


class Panel(NamedTuple):
    name: str  # of a curve, or of several: name/0, name/1 ...
    title: str
    reading: str


PANELS = (
    Panel("control_measure", "control measure", "how much higher the validation loss is with another image's hint: 0 "
          "until control sets in"),
    Panel("validation_loss", "validation loss", "always on the same pairs with the same noise: the lower the better"),
    Panel("loss", "training loss", "it jumps with the timesteps that are drawn, and hardly shows control setting in"),
    Panel("iou", "IoU", "of what is seen in the grid with what is true, for synthetic data"),
    Panel("keypoint_distance", "distance of joints", "of the people in the grid from their hints', in pixels"),
    Panel("zero_convs", "zero convolutions", "the norm of each, from 0 on; the middle's is the last"),
    Panel("lr", "learning rate", "with its warm-up and its schedule"),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- curves


def scalars(values: dict) -> dict[str, float]:
    """The numbers of a log line by name, those of a list as name/0, name/1 ...; what is not a number is left out."""
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

    def points(self) -> Points:
        """At most MOST_POINTS, each the last step of a few and their mean value; what is not finite is left out."""
        steps, values = np.array(self.steps), np.array(self.values)
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
        if not len(steps):
            return []
        parts = (np.array_split(numbers, min(len(steps), MOST_POINTS)) for numbers in (steps, values))
        return [(int(steps[-1]), float(values.mean())) for steps, values in zip(*parts, strict=True)]


class Curves(defaultdict[str, Curve]):
    """What a run has logged for the panels, by name."""

    def __init__(self):
        super().__init__(Curve)

    def add(self, values: dict) -> None:
        """A line of the log."""
        shown = {panel.name: values[panel.name] for panel in PANELS if panel.name in values}
        for name, number in scalars(shown).items():
            self[name].add(values["step"], number)

    def at(self, name: str, step: int) -> float | None:
        """The newest value, if it is that of `step`."""
        curve = self[name]
        return curve.values[-1] if curve.steps and curve.steps[-1] == step else None


# ----------------------------------------------------------------------------------------------------------- the page

PAGE = """<!doctype html>
<html><head><meta charset="utf-8"/>{reload}<title>{title}</title>
<style>body {{ font: 15px sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }} figure {{ margin: 2em 0 }}
svg {{ width: 34em; max-width: 100% }} img {{ max-width: 100% }}</style></head>
<body><h1>{title}</h1>
<p>{status}</p>
{body}
</body></html>
"""


def write_report(run: RunFolder, curves: Curves, steps: int, set_in: int | None) -> None:
    """Raises OSError if it cannot be written. Until `steps` are done browsers load it again by themselves."""
    step = max((curve.steps[-1] for curve in curves.values() if curve.steps), default=0)
    status = f"step {step} of {steps}; " + (f"control set in at step {set_in}" if set_in else "control has not set in")
    sections = [section(panel, curves, set_in) for panel in PANELS]
    pictures = [
        f'<h2>{grid.stem}</h2>\n<img loading="lazy" src="samples/{grid.name}"/>' for grid in reversed(run.grids())
    ]
    reload = "" if step >= steps else f'<meta http-equiv="refresh" content="{RELOADED}"/>'
    body = "\n".join(filter(None, [*sections, *pictures]))
    page = PAGE.format(reload=reload, title=escape(str(run.path)), status=status, body=body)
    write_text(run.report, page)


def section(panel: Panel, curves: Curves, set_in: int | None = None) -> str:
    """ "" where nothing is logged of it."""
    shown = {}
    for name, curve in curves.items():
        kind, _, place = name.partition("/")
        if kind == panel.name:
            shown[f"layer {int(place) + 1}" if place else ""] = curve.points()
    if not any(shown.values()):
        return ""
    return f"<figure>{chart(panel.title, shown, set_in)}<figcaption>{panel.reading}</figcaption></figure>"
