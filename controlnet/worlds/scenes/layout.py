"""Which things a scene has, and where they stand: none hides much of another."""

from dataclasses import dataclass

import numpy as np

from .paint import PAINTS
from .setting import SKIES, Setting
from .things import KINDS, Kind

PLACES = {"left": (0.16, 0.3), "middle": (0.42, 0.58), "right": (0.7, 0.84)}
SCALES = {"large": (0.44, 0.56), "small": (0.22, 0.28)}
HIDDEN_MOST = 0.15  # of a thing's box, by another's


@dataclass(frozen=True)
class Placed:
    """A thing: its foot is x, y (fractions of the side, y down), its unit `scale`; `depth` is 0 near to 1 far."""

    kind: Kind
    colour: str
    size: str
    place: str
    x: float
    y: float
    scale: float
    depth: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.kind.width * self.scale / 2
        return self.x - half, self.y - self.kind.height * self.scale, self.x + half, self.y


def random_things(rng: np.random.Generator, setting: Setting) -> list[Placed]:
    """One to four, from far to near, no two of the same colour."""
    count = rng.choice([1, 2, 3, 4], p=(0.22, 0.36, 0.28, 0.14))
    names, colours, things = kinds_for(rng, setting, count), list(rng.permutation(contrasting(setting))), []
    for name in names:
        for _ in range(20):
            size = "large" if rng.random() < (0.8 if count == 1 else 0.5) else "small"
            thing = placed(rng, setting, KINDS[name], str(colours[-1]), size)
            if all(apart(thing, other) for other in things):
                things.append(thing)
                colours.pop()
                break
    return sorted(things, key=lambda thing: -thing.depth)


def kinds_for(rng: np.random.Generator, setting: Setting, count: int) -> list[str]:
    """The names of different kinds. Those that live at sea are frequent there, and rare elsewhere."""
    wet = setting.ground == "sea" or setting.far == "sea"
    weights = {"land": 0.4 if setting.ground == "sea" else 1.0, "sky": 1.2, "sea": 4.0 if wet else 0.12}
    shares = np.array([kind.share * weights[kind.home] for kind in KINDS.values()])
    return [str(name) for name in rng.choice(list(KINDS), size=count, replace=False, p=shares / shares.sum())]


def place_at(x: float) -> str:
    """The place that is nearest to x, a fraction of the side."""
    return min(PLACES, key=lambda place: abs(x - sum(PLACES[place]) / 2))


def contrasting(setting: Setting) -> list[str]:
    """The colours that can be told from all that may lie behind a thing."""
    behind = np.array([*SKIES[setting.sky], setting.ground_colour])  # (N, 3)
    return [name for name, paint in PAINTS.items() if np.linalg.norm(behind - paint, axis=1).min() >= 72]


def placed(rng: np.random.Generator, setting: Setting, kind: Kind, colour: str, size: str) -> Placed:
    """A thing at a random place, where it fits into the image."""
    place = str(rng.choice(list(PLACES)))
    scale = float(rng.uniform(*SCALES[size]) / max(kind.width, kind.height))
    half, high = kind.width * scale / 2, kind.height * scale
    low, top = max(PLACES[place][0], half + 0.02), min(PLACES[place][1], 0.98 - half)
    x = float(rng.uniform(low, top))
    if kind.home == "sky":
        y = float(rng.uniform(high + 0.03, max(high + 0.04, setting.horizon - 0.03)))
        return Placed(kind, colour, size, place, x, y, scale, depth=0.25 if size == "large" else 0.75)
    if size == "large":
        y = float(rng.uniform(0.84, 0.96))
    elif kind.home == "sea" and setting.far == "sea":  # on the sea before the shore
        y = float(rng.uniform(setting.horizon + 0.05, setting.shore - 0.005))
    else:
        y = float(rng.uniform(setting.shore + 0.07, setting.shore + 0.5 * (1 - setting.shore)))
    if kind.name == "fish":  # below the surface
        y = max(y, min(0.97, setting.horizon + high + 0.03))
    return Placed(kind, colour, size, place, x, y, scale, depth=depth_at(setting, y))


def depth_at(setting: Setting, y: float | np.ndarray) -> float | np.ndarray:
    """Of the ground: 0 at the image's bottom, 0.9 at the horizon."""
    return 0.9 * np.clip((1 - y) / (1 - setting.horizon), 0, 1)


def apart(a: Placed, b: Placed) -> bool:
    """Whether the boxes do not overlap, or do so at different depths and hide little of the farther one."""
    (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = a.box, b.box
    across = min(right, other_right) - max(left, other_left)
    down = min(bottom, other_bottom) - max(top, other_top)
    if across <= 0 or down <= 0:
        return True
    far = a if a.depth > b.depth else b
    area = (far.box[2] - far.box[0]) * (far.box[3] - far.box[1])
    return abs(a.depth - b.depth) > 0.03 and across * down < HIDDEN_MOST * area
