"""What people would type for a scene: it is true, but leaves much out."""

from collections.abc import Sequence

import numpy as np

from ..world import Thing, joined
from .layout import Placed
from .setting import Setting
from .things import KINDS

# For lists, and for the ends of sentences.
SKY_WORDS = {
    "day": (("day", "blue sky", "daytime"), ("under a blue sky", "by day", "during the day")),
    "sunset": (("sunset", "evening", "sunset sky"), ("at sunset", "in the evening", "under a sunset sky")),
    "night": (("night", "at night", "night sky", "starry night"), ("at night", "under a night sky", "under the stars")),
    "rain": (("rain", "rainy day", "gray sky"), ("in the rain", "on a rainy day", "under a gray sky")),
    "snowfall": (("snowing", "falling snow", "winter"), ("in falling snow", "in winter", "while it snows")),
    "sun": (("sunny day", "sun", "sunny"), ("on a sunny day", "in the sun", "in sunshine")),
    "moon": (("night", "moon", "at night", "moonlight"), ("at night", "under the moon", "in the moonlight")),
}
FAR_WORDS = {
    "hills": (("hills",), ("with hills behind", "in front of hills")),
    "mountains": (("mountains",), ("with mountains behind", "in front of mountains")),
    "snowy mountains": (("snowy mountains", "mountains"), ("with snowy mountains behind", "in front of mountains")),
}
# For lists, for the ends of any sentences, and for those of things that all stand on land, swim or fly.
GROUND_WORDS = {
    "grass": {
        "list": ("grass", "green grass", "meadow"),
        "any": ("in a meadow",),
        "land": ("on grass", "on green grass", "in a meadow"),
        "sky": ("over a meadow",),
    },
    "sand": {
        "list": ("sand", "desert"),
        "any": ("in the desert",),
        "land": ("on sand", "in the desert"),
        "sky": ("over the desert",),
    },
    "beach": {
        "list": ("beach", "sandy beach", "beach and sea"),
        "any": ("at the beach", "by the sea"),
        "land": ("on a beach", "at the beach", "on sand"),
        "sky": ("over a beach",),
    },
    "snow": {
        "list": ("snow", "winter"),
        "any": ("in a snowy landscape", "in winter"),
        "land": ("in the snow", "on snow"),
        "sky": ("over the snow",),
    },
    "sea": {
        "list": ("sea", "ocean", "water"),
        "any": ("at sea",),
        "land": ("at sea", "on an island"),
        "sea": ("in the sea", "in the water", "at sea"),
        "sky": ("over the sea",),
    },
}
SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
PLACE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}


def caption(rng: np.random.Generator, setting: Setting, things: Sequence[Placed]) -> str:
    """A few words ("a red house"), a sentence, or words between commas."""
    style = rng.choice(["short", "sentence", "list"], p=(0.2, 0.45, 0.35))
    count = 1 if style == "short" else len(things) if rng.random() < 0.75 else int(rng.integers(1, len(things) + 1))
    named = [things[i] for i in rng.permutation(len(things))[:count]]
    if style == "list":
        return list_of_words(rng, setting, named)
    told = joined([with_article(phrase(rng, thing, detail=0.4 if style == "short" else 1.0)) for thing in named])
    where = [] if style == "short" else where_words(rng, setting, named, listed=False)
    return f"{told} {' '.join(where)}".strip()


def inventory(things: Sequence[Thing]) -> str:
    """All that there is, for measuring: "a red house on the left and a person in blue in the middle"."""
    told = []
    for thing in things:
        kind = KINDS[thing.kind]
        told.append(with_article(f"{kind.coloured[0].format(thing.colour, kind.words[0])} {PLACE_WORDS[thing.place]}"))
    return joined(told)


def list_of_words(rng: np.random.Generator, setting: Setting, named: Sequence[Placed]) -> str:
    """As in "large blue boat on the left, small white bird, sunset, sea"; the landscape may come first."""
    article = with_article if rng.random() < 0.4 else str
    parts, where = [article(phrase(rng, thing)) for thing in named], where_words(rng, setting, named, listed=True)
    return ", ".join(where + parts if rng.random() < 0.3 else parts + where)


def phrase(rng: np.random.Generator, thing: Placed, detail: float = 1.0) -> str:
    """As "small red house on the left", mostly with less; `detail` scales how often size and place are told."""
    size, coloured, place = rng.random(3) < (0.35 * detail, 0.88, 0.3 * detail)
    word = str(rng.choice(thing.kind.words))
    if coloured:
        word = thing.kind.coloured[rng.integers(len(thing.kind.coloured))].format(thing.colour, word)
    words = [str(rng.choice(SIZE_WORDS[thing.size]))] if size else []
    return " ".join([*words, word, *([PLACE_WORDS[thing.place]] if place else [])])


def where_words(rng: np.random.Generator, setting: Setting, named: Sequence[Placed], listed: bool) -> list[str]:
    """Ground, distance and sky, each left out at times, for a list or for the end of a sentence about `named`."""
    ground = GROUND_WORDS["beach" if setting.far == "sea" else setting.ground]
    homes = {thing.kind.home for thing in named}
    grounds = ground["list"] if listed else ground.get(homes.pop() if len(homes) == 1 else "any", ground["any"])
    skies = SKY_WORDS[setting.sky]
    if rng.random() >= 0.5 and setting.sky != "sunset":
        skies = SKY_WORDS.get(setting.light, skies)
    fars = FAR_WORDS.get(setting.far)
    words = []
    for share, choices in ((0.6, grounds), (0.4, fars and fars[not listed]), (0.7, skies[not listed])):
        if choices and rng.random() < share:
            words.append(str(rng.choice(choices)))
    return [words[i] for i in rng.permutation(len(words))] if listed else words


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
