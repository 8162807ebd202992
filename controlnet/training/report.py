"""A run as a page: OUT/report.html, its curves drawn in it and its grids beside it, without any script."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from .curves import Curve, Curves
from .run_state import RunFolder, write_text

WIDTH, HEIGHT, MOST_POINTS = 640, 160, 400
RELOADED = 30  # seconds


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
    Panel("zero_convs", "zero convolutions", "the norm of each, from 0 on; the middle's is the last"),
    Panel("lr", "learning rate", "with its warm-up and its schedule"),
)  # fmt: skip

PAGE = """<!doctype html>
<html><head><meta charset="utf-8"/>{reload}<title>{title}</title>
<style>body {{ font: 15px sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }} h2 {{ margin-bottom: 0 }}
p {{ margin-top: 0.2em }} svg {{ background: #f6f6f6 }} polyline {{ fill: none; stroke-width: 1.5 }}
text {{ font-size: 11px }} img {{ max-width: 100% }}</style></head>
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


def section(panel: Panel, curves: Curves, set_in: int | None) -> str:
    """ "" where nothing is logged of it."""
    shown = [curve for name, curve in curves.items() if name.split("/")[0] == panel.name and curve.steps]
    if not shown:
        return ""
    return f"<h2>{panel.title}</h2>\n<p>{panel.reading}</p>\n{plot(shown, set_in)}"


def plot(curves: Sequence[Curve], set_in: int | None) -> str:
    """SVG: polylines of as many colours, from their smallest to their largest value, and where control set in."""
    curves = [points_of(curve) for curve in curves]
    low, high = (f(np.concatenate([values for _, values in curves])) for f in (np.min, np.max))
    last = max(steps[-1] for steps, _ in curves)
    lines = []
    for i, (steps, values) in enumerate(curves):
        x, y = WIDTH * steps / last, HEIGHT * (high - values) / ((high - low) or 1)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        lines.append(f'<polyline stroke="hsl({220 + 137 * i} 70% 45%)" points="{points}"/>')
    if set_in:
        x = WIDTH * set_in / last
        lines.append(f'<path stroke="#888" stroke-dasharray="4" d="M{x:.1f} 0V{HEIGHT}"><title>control sets in</title>'
                     "</path>")  # fmt: skip
    labels = [(4, 12, f"{high:.4g}"), (4, HEIGHT - 4, f"{low:.4g}"), (WIDTH + 4, HEIGHT, f"step {last:.0f}")]
    lines += [f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in labels]
    return f'<svg width="{WIDTH + 90}" height="{HEIGHT + 4}">\n' + "\n".join(lines) + "\n</svg>"


def points_of(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, of many points the means of as many neighbours as leave MOST_POINTS; what is not finite, as a
    loss may be, is left out."""
    steps, values = np.array(curve.steps, float), np.array(curve.values)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(steps):
        return np.zeros(1), np.zeros(1)
    edges = np.arange(0, len(steps), -(-len(steps) // MOST_POINTS))
    counts = np.diff([*edges, len(steps)])
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts
