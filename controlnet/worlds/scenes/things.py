"""The things of the scenes: what each is called, how wide and high it is, where it belongs."""

from collections.abc import Callable
from dataclasses import dataclass

from . import buildings, creatures, plants, vehicles
from .pen import Pen


@dataclass(frozen=True)
class Kind:
    """`words` are its names in captions, `coloured` says how a name is joined with its colour; `width` and `height` are
    in units of its size; `home` is land, sea or sky; `share` is how often it is chosen."""

    name: str
    draw: Callable[[Pen], None]
    words: tuple[str, ...]
    width: float
    height: float
    home: str = "land"
    share: float = 1.0
    coloured: tuple[str, ...] = ("{0} {1}",)


PERSON = ("{1} in {0}", "{1} dressed in {0}")
SNOWMAN = ("{1} with a {0} scarf", "{1} with a {0} hat", "{1} with {0} hat and scarf")

KINDS = {
    kind.name: kind
    for kind in (
        Kind("house", buildings.house, ("house", "house", "cottage"), 0.94, 0.98, share=1.6),
        Kind("castle", buildings.castle, ("castle",), 1.06, 1.0),
        Kind("windmill", buildings.windmill, ("windmill",), 0.84, 1.02),
        Kind("lighthouse", buildings.lighthouse, ("lighthouse",), 0.42, 1.0),
        Kind("tent", buildings.tent, ("tent",), 1.0, 0.72),
        Kind("umbrella", buildings.umbrella, ("umbrella", "parasol"), 1.0, 1.0),
        Kind("tree", plants.tree, ("tree",), 0.8, 1.0, share=1.6),
        Kind("pine", plants.pine, ("pine", "pine tree"), 0.72, 1.0),
        Kind("flower", plants.flower, ("flower",), 0.62, 1.0, share=1.2),
        Kind("mushroom", plants.mushroom, ("mushroom",), 0.94, 0.92),
        Kind("car", vehicles.car, ("car",), 1.0, 0.6, share=1.2),
        Kind("boat", vehicles.boat, ("boat", "sailboat", "boat"), 1.0, 1.0, "sea", share=1.4),
        Kind("rocket", vehicles.rocket, ("rocket",), 0.7, 1.0, "sky"),
        Kind("balloon", vehicles.balloon, ("balloon", "hot-air balloon", "hot air balloon"), 0.76, 1.0, "sky"),
        Kind("bird", creatures.bird, ("bird",), 1.14, 0.9, "sky", share=1.2),
        Kind("fish", creatures.fish, ("fish",), 1.0, 0.66, "sea", share=0.8),
        Kind("cat", creatures.cat, ("cat", "cat", "kitten"), 0.8, 1.0, share=1.5),
        Kind("dog", creatures.dog, ("dog", "dog", "puppy"), 1.18, 0.92, share=1.5),
        Kind("snowman", creatures.snowman, ("snowman",), 0.9, 1.05, coloured=SNOWMAN),
        Kind("person", creatures.person, ("person",), 0.64, 1.0, share=1.3, coloured=PERSON),
    )
}
