"""Draws all of a scene but its things: the sky, what is far away, the ground, and what each thing stands on."""

import numpy as np

from ..canvas import RGB, Canvas
from .layers import Layers
from .layout import Placed
from .paint import mixed, tint
from .setting import GROUNDS, SKIES, Setting

WHITE, NAVY, MOON, SHADOW = (255, 255, 255), (30, 36, 84), (250, 240, 200), (30, 40, 90)
HILL, SNOWY_HILL, ROCK, PEAK = (112, 172, 92), (206, 220, 238), (134, 142, 172), (244, 248, 252)
CLOUD = {"day": WHITE, "sunset": (255, 206, 180), "night": (78, 88, 146), "rain": (214, 220, 228), "snowfall": WHITE}
RISE = {"grass": (144, 190, 90), "sand": (228, 200, 146), "snow": (216, 226, 241)}  # of the ground, where it is nearer
X = np.linspace(0, 1, 25)


def sky_gradient(setting: Setting) -> np.ndarray:
    """uint8 (32, 1, 3), from the top of the image to its bottom; below the horizon the last colour goes on."""
    return np.rint([sky_at(setting, y) for y in np.linspace(0, 1, 32)]).astype(np.uint8)[:, None]


def sky_at(setting: Setting, y: float) -> RGB:
    top, low = SKIES[setting.sky]
    return mixed(top, low, min(1.0, y / setting.horizon))


def draw_backdrop(
    canvas: Canvas, layers: Layers, setting: Setting, sky_rng: np.random.Generator, rng: np.random.Generator
) -> None:
    """`sky_rng` is for the sky and the weather, `rng` for the land."""
    draw_light(canvas, layers, setting, sky_rng)
    layers.start("cloud", 1.0)
    draw_clouds(canvas, setting, sky_rng)
    if setting.far in ("mountains", "snowy mountains"):
        layers.start("mountain", 0.97)
        draw_mountains(canvas, setting, rng)
    elif setting.far == "hills":
        layers.start("hill", 0.94)
        draw_hills(canvas, setting, rng)
    elif setting.far == "sea":
        layers.start("sea")
        draw_sea(canvas, setting, rng, setting.shore + 0.05)
    layers.start(setting.ground)
    if setting.ground == "sea":
        draw_sea(canvas, setting, rng, 1.0)
    else:
        draw_land(canvas, setting, rng)
    draw_weather(canvas, setting, sky_rng)


def draw_light(canvas: Canvas, layers: Layers, setting: Setting, rng: np.random.Generator) -> None:
    """The sun in its glow, or the moon among stars; glow and stars are part of the sky."""
    at = np.array(setting.light_at)
    if setting.light == "sun":
        radius, colour = (0.1, (255, 240, 180)) if setting.sky == "sunset" else (0.074, (255, 218, 84))
        canvas.disc(at, 1.4 * radius, mixed(sky_at(setting, at[1]), colour, 0.55))
        layers.start("sun", 1.0)
        canvas.disc(at, radius, colour)
    elif setting.light == "moon":
        draw_stars(canvas, setting, rng)
        layers.start("moon", 1.0)
        if rng.random() < 0.4:
            canvas.disc(at, 0.082, MOON)
        else:
            canvas.polygon(at + 0.09 * crescent(rng.choice([-1, 1])), MOON)


def draw_stars(canvas: Canvas, setting: Setting, rng: np.random.Generator) -> None:
    """Everywhere but near the moon."""
    for star in rng.uniform((0.03, 0.03), (0.97, setting.horizon - 0.06), (int(rng.integers(9, 16)), 2)):
        if np.hypot(*(star - setting.light_at)) > 0.13:
            canvas.disc(star, rng.uniform(0.011, 0.015), (236, 236, 212))


def crescent(side: int) -> np.ndarray:
    """(44, 2) of radius 1, tilted: the outer edge is most of a circle, the inner one an arc between its ends."""
    ends = 0.62 * np.pi
    outer, inner = np.linspace(-ends, ends, 25), np.linspace(0.72 * np.pi, -0.72 * np.pi, 19)
    edge = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    reach = np.sin(ends) / np.sin(0.72 * np.pi)
    hollow = np.stack([np.cos(inner), np.sin(inner)], axis=1) * reach
    hollow[:, 0] += np.cos(ends) - reach * np.cos(0.72 * np.pi)
    tilt = np.array([[0.9, 0.43], [-0.43, 0.9]])
    return (np.concatenate([edge, hollow]) @ tilt) * [side, 1]


def draw_clouds(canvas: Canvas, setting: Setting, rng: np.random.Generator) -> None:
    """Side by side, and away from sun and moon."""
    places = rng.permutation([0.12, 0.37, 0.63, 0.88])
    free = [x for x in places if setting.light == "nothing" or abs(x - setting.light_at[0]) > 0.24]
    colour = CLOUD[setting.sky]
    for x in free[: setting.clouds]:
        x, y, wide = x + rng.uniform(-0.04, 0.04), rng.uniform(0.08, 0.26), rng.uniform(0.085, 0.125)
        for tone, lift in ((mixed(colour, SKIES[setting.sky][0], 0.25), 0.0), (colour, 0.014)):
            for dx, dy, radius in ((-0.75, 0.1, 0.42), (0.0, -0.12, 0.6), (0.72, 0.08, 0.45)):
                canvas.disc(np.array([x + dx * wide, y + dy * wide - lift]), radius * wide, tone)
            row = y + 0.3 * wide - lift
            canvas.limb(np.array([[x - 0.8 * wide, row], [x + 0.8 * wide, row]]), 0.42 * wide, tone)


def draw_mountains(canvas: Canvas, setting: Setting, rng: np.random.Generator) -> None:
    rock, snow = setting.lit(ROCK), setting.lit(PEAK)
    base = setting.horizon + 0.05
    for x in rng.permutation([0.1, 0.5, 0.9]) + rng.uniform(-0.1, 0.1, 3):
        high, half = rng.uniform(0.18, 0.32), rng.uniform(0.26, 0.36)
        top = np.array([x, base - high])
        left, middle, right = (np.array([x + share * half, base]) for share in (-1, 0.1, 1))
        canvas.polygon(np.stack([left, top, right]), rock)
        canvas.polygon(np.stack([middle, top, right]), mixed(rock, NAVY, 0.18))
        if setting.far == "snowy mountains":
            down = ((0.38, -1), (0.24, -0.1), (0.42, 0.1), (0.26, 0.4), (0.38, 1))  # of lines from the top to the base
            edge = [top + share * (np.array([x + across * half, base]) - top) for share, across in down]
            canvas.polygon(np.stack([top, *edge]), snow)


def draw_hills(canvas: Canvas, setting: Setting, rng: np.random.Generator) -> None:
    colour = setting.lit(SNOWY_HILL if setting.ground == "snow" else HILL)
    for lift, haze in ((0.075, 0.45), (0.0, 0.2)):
        waves = np.sin(2 * np.pi * (rng.uniform(0.8, 1.6) * X + rng.uniform()))
        line = setting.horizon + 0.01 - rng.uniform(0.05, 0.08) * (1 + 0.8 * waves) - lift
        draw_below(canvas, line, mixed(colour, SKIES[setting.sky][1], haze))


def draw_sea(canvas: Canvas, setting: Setting, rng: np.random.Generator, bottom: float) -> None:
    """From the horizon to `bottom`, where land covers it; without land (`bottom` 1) it is darker where it is near."""
    colour, top = setting.lit(GROUNDS["sea"]), setting.horizon
    draw_below(canvas, np.full(25, top), colour)
    if bottom == 1:
        waves = np.abs(np.sin(np.pi * (5 * np.linspace(0, 1, 61) + rng.uniform())))
        line = top + 0.42 * (1 - top) + 0.014 * waves
        draw_below(canvas, line, mixed(colour, NAVY, 0.16))
    for _ in range(int(rng.integers(4, 9) if bottom == 1 else rng.integers(2, 4))):
        x, y, half = rng.uniform(0, 1), rng.uniform(top + 0.03, bottom - 0.03), rng.uniform(0.03, 0.07)
        canvas.limb(np.array([[x - half, y], [x + half, y]]), 0.015, tint(colour, 0.3))


def draw_land(canvas: Canvas, setting: Setting, rng: np.random.Generator) -> None:
    """A ground with a gentle edge, and in front a second rise in another tone."""
    rise = setting.shore + rng.uniform(0.4, 0.6) * (1 - setting.shore)
    near_colour = setting.lit(RISE[setting.ground])
    for edge, swell, colour in ((setting.shore, 0.008, setting.ground_colour), (rise, 0.022, near_colour)):
        draw_below(canvas, edge + swell * np.sin(2 * np.pi * (rng.uniform(0.6, 1.3) * X + rng.uniform())), colour)
    if setting.ground == "grass":
        colour = setting.lit((112, 164, 78))
        for x, y in rng.uniform((0.04, setting.shore + 0.08), (0.96, 0.98), (int(rng.integers(3, 7)), 2)):
            for lean, high in ((-0.024, 0.03), (0.0, 0.042), (0.024, 0.03)):
                canvas.polygon(np.array([[x - 0.013, y], [x + lean, y - high], [x + 0.013, y]]), colour)


def draw_below(canvas: Canvas, line: np.ndarray, colour: RGB) -> None:
    """Fills the image below a line, its heights from left to right."""
    across = np.linspace(0, 1, len(line))
    canvas.polygon(np.concatenate([np.stack([across, line], axis=1), [[1, 1], [0, 1]]]), colour)


def draw_weather(canvas: Canvas, setting: Setting, rng: np.random.Generator) -> None:
    """Rain or snow in the air, behind the things; what it falls on keeps its labels."""
    labels = canvas.labels.copy()
    if setting.sky == "rain":
        for drop in rng.uniform(-0.05, 1.05, (26, 1, 2)):
            canvas.limb(drop + [[0, 0], [-0.02, 0.06]], 0.014, (206, 222, 236))
    elif setting.sky == "snowfall":
        for flake in rng.uniform(0, 1, (34, 2)):
            canvas.disc(flake, rng.uniform(0.011, 0.016), WHITE)
    canvas.labels.paste(labels)


def draw_footing(canvas: Canvas, layers: Layers, setting: Setting, thing: Placed) -> None:
    """What a thing stands on: its shadow, at sea an island, and on land a pond for what swims; nothing for what flies.
    These layers have the ground's depth."""
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
