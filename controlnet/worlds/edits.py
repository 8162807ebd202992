"""`edits`: scenes with one change, of a thing's colour or of the sky; the hint is the scene before it."""

from dataclasses import replace

import numpy as np

from .scenes import Scenes, draw_scene
from .scenes.captions import with_article
from .scenes.layout import Placed, contrasting, random_things
from .scenes.setting import SKIES, Setting, random_setting, under_sky
from .world import Picture, Sample

SKY_WORDS = {"day": "day", "sunset": "sunset", "night": "night", "rain": "rain", "snowfall": "snow"}


class Edits(Scenes):
    """Captions are instructions: 'make it a red house', 'make it night'."""

    name = "edits"

    def pair(self, index: int) -> tuple[Picture, Picture]:
        """The scene before and after the change; the latter's caption is the instruction. All else is the same."""
        rng = self.rng(index)
        setting = random_setting(rng)
        things = random_things(rng, setting)
        seed = int(rng.integers(2**32))
        instruction, *changed = random_change(rng, setting, things)

        before, after = (
            draw_scene(self.size, *scene, np.random.default_rng(seed), apart=True)
            for scene in ((setting, things), changed)
        )
        return before, replace(after, caption=instruction)

    def draw(self, index: int) -> Picture:
        return self.pair(index)[1]

    def __getitem__(self, index: int) -> Sample:
        before, after = self.pair(index)
        return after.with_hint(before.image)


def random_change(
    rng: np.random.Generator, setting: Setting, things: list[Placed]
) -> tuple[str, Setting, list[Placed]]:
    """-> the instruction, and the setting and things after it, which can still be told from what is behind them."""
    skies = [] if rng.random() < 0.5 else other_skies(rng, setting, things)
    if skies:
        changed = skies[rng.integers(len(skies))]
        return f"make it {SKY_WORDS[changed.sky]}", changed, things
    number = int(rng.integers(len(things)))
    thing, taken = things[number], {thing.colour for thing in things}
    colour = str(rng.choice([name for name in contrasting(setting) if name not in taken]))
    phrase = thing.kind.coloured[0].format(colour, thing.kind.words[0])
    changed = [*things[:number], replace(thing, colour=colour), *things[number + 1 :]]
    return f"make it {with_article(phrase)}", setting, changed


def other_skies(rng: np.random.Generator, setting: Setting, things: list[Placed]) -> list[Setting]:
    """This setting under every other sky that leaves all things visible. Snow falls where it lies, elsewhere rain."""
    unfit = {setting.sky, "rain" if setting.ground == "snow" else "snowfall"}
    land = setting.ground, setting.far, setting.horizon, setting.shore
    skies = [under_sky(rng, sky, *land) for sky in SKIES if sky not in unfit]
    return [sky for sky in skies if all(thing.colour in contrasting(sky) for thing in things)]
