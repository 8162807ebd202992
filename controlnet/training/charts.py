"""Curves as SVG, which browsers draw by themselves."""

from collections.abc import Iterable
from html import escape

WIDTH, HEIGHT = 400, 170
LEFT, RIGHT, TOP, BOTTOM = 48, 392, 26, 148  # of the field, in pixels
LINES = 3  # across it

Points = list[tuple[float, float]]  # step and value


def chart(title: str, curves: dict[str, Points], set_in: int | None = None) -> str:
    """`curves` by their names, which the legend shows with the last values if they are few. A dashed line marks
    `set_in`, the step at which control set in."""
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return svg(title, [text(WIDTH / 2, HEIGHT / 2, "nothing yet", "middle")])
    steps, values = (sorted({point[i] for points in curves.values() for point in points}) for i in (0, 1))
    first, last, low, high = steps[0], steps[-1], values[0], values[-1]
    x = scale(first, last, LEFT, RIGHT)
    y = scale(low, high, BOTTOM, TOP)
    parts = [text(LEFT, HEIGHT - 6, f"{first:g}", "start"), text(RIGHT, HEIGHT - 6, f"step {last:g}", "end")]
    levels = [low + (high - low) * i / (LINES - 1) for i in range(LINES)]
    for value, label in zip(levels, labels(levels), strict=True):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{RIGHT}" stroke="currentColor" opacity="0.15"/>')
        parts.append(text(LEFT - 4, y(value) + 4, label, "end"))
    for i, points in enumerate(curves.values()):
        points = points * 2 if len(points) == 1 else points  # of no length, but with round ends
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        drawn = f'<polyline points="{path}" fill="none" stroke="{colour(i, len(curves))}" stroke-width="1.5"'
        parts.append(f'{drawn} stroke-linecap="round" stroke-linejoin="round"/>')
    if set_in:
        line = f'<path d="M{x(set_in):.1f} {TOP}V{BOTTOM}" stroke="currentColor" stroke-dasharray="4" opacity="0.5">'
        parts.append(f"{line}<title>control sets in</title></path>")
    return svg(title, [*parts, legend(curves)])


def scale(low: float, high: float, start: float, end: float):
    """A function from values between `low` and `high` to where between `start` and `end` they are drawn."""
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1)


def labels(values: list[float]) -> list[str]:
    """As short as tells them apart, as far as there is room."""
    for digits in range(2, 6):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(values):
            break
    return texts


def colour(i: int, count: int) -> str:
    apart = 120 if count < 4 else 250 / count  # degrees
    return f"hsl({215 + apart * i:.0f} 80% 50%)"


def legend(curves: dict[str, Points]) -> str:
    few = len(curves) < 4
    names = [f"{name} {points[-1][1]:.3g}" if few else name.split()[-1] for name, points in curves.items()]
    spans = (f'<tspan fill="{colour(i, len(names))}" dx="7">{escape(name)}</tspan>' for i, name in enumerate(names))
    return f'<text x="{RIGHT}" y="14" text-anchor="end">{"".join(spans)}</text>'


def text(x: float, y: float, words: str, anchor: str) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="currentColor" opacity="0.7">{escape(words)}</text>'
    )


def svg(title: str, parts: Iterable[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" font-size="11">'
    return f'{head}<text x="0" y="14" fill="currentColor">{escape(title)}</text>{"".join(parts)}</svg>'
