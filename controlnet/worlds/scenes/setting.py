"""Where a scene is set: which sky, which ground, what is far away, and their colours."""

from dataclasses import dataclass

import numpy as np

from ..canvas import RGB

# At the top and at the horizon.
SKIES: dict[str, tuple[RGB, RGB]] = {
    "day": ((124, 196, 240), (206, 234, 248)),
    "sunset": ((128, 98, 172), (255, 190, 128)),
    "night": ((22, 28, 70), (58, 70, 132)),
    "rain": ((116, 132, 152), (176, 188, 200)),
    "snowfall": ((150, 166, 188), (206, 216, 228)),
}
GROUNDS: dict[str, RGB] = {
    "grass": (166, 206, 96),
    "sand": (240, 218, 168),
    "snow": (236, 242, 250),
    "sea": (62, 146, 200),
}
# What the colours of the land are multiplied by under each sky.
LIGHT = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.84, 0.8),
    "night": (0.4, 0.5, 0.68),
    "rain": (0.8, 0.86, 0.9),
    "snowfall": (0.92, 0.95, 0.98),
}
# What may rise at the horizon, and how often.
FAR = {
    "grass": {"nothing": 0.3, "hills": 0.4, "mountains": 0.15, "snowy mountains": 0.15},
    "sand": {"sea": 0.55, "nothing": 0.25, "mountains": 0.2},
    "snow": {"nothing": 0.35, "hills": 0.25, "snowy mountains": 0.4},
    "sea": {"nothing": 0.6, "hills": 0.15, "mountains": 0.15, "snowy mountains": 0.1},
}
CLOUDS = {"day": (0, 4), "sunset": (0, 3), "night": (0, 3), "rain": (1, 4), "snowfall": (1, 4)}  # at least, and below


@dataclass(frozen=True)
class Setting:
    """`horizon` and `shore` are heights from the top, as fractions of the image's: the land begins at the shore, which
    is the horizon unless the sea lies between them. `light` is the sun or the moon, at `light_at`, or nothing."""

    sky: str
    ground: str
    far: str  # nothing, hills, mountains, snowy mountains or sea
    horizon: float
    shore: float
    light: str
    light_at: tuple[float, float]
    clouds: int

    def lit(self, colour: RGB) -> RGB:
        """A colour of the land in the light of this sky."""
        return tuple(round(share * c) for share, c in zip(LIGHT[self.sky], colour, strict=True))

    @property
    def ground_colour(self) -> RGB:
        return self.lit(GROUNDS[self.ground])


def random_setting(rng: np.random.Generator) -> Setting:
    sky = str(rng.choice(["day", "sunset", "night", "rain"], p=(0.42, 0.2, 0.25, 0.13)))
    ground = str(rng.choice(list(GROUNDS), p=(0.38, 0.2, 0.18, 0.24)))
    if sky == "rain" and ground == "snow":
        sky = "snowfall"
    far = str(rng.choice(list(FAR[ground]), p=list(FAR[ground].values())))
    horizon = float(rng.uniform(0.5, 0.62))
    shore = horizon + float(rng.uniform(0.09, 0.14)) if far == "sea" else horizon
    return under_sky(rng, sky, ground, far, horizon, shore)


def under_sky(rng: np.random.Generator, sky: str, ground: str, far: str, horizon: float, shore: float) -> Setting:
    """This land with what such a sky has in it."""
    sunny = sky in ("day", "sunset") and rng.random() < 0.7
    low = rng.uniform(0, 0.14)  # how far above the horizon the sun is when it sets
    light_at = float(rng.uniform(0.14, 0.86)), float(horizon - low if sky == "sunset" else rng.uniform(0.12, 0.2))
    light = "moon" if sky == "night" else "sun" if sunny else "nothing"
    return Setting(sky, ground, far, horizon, shore, light, light_at, clouds=int(rng.integers(*CLOUDS[sky])))
