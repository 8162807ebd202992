"""Scenes: the truth is that of the pixels, and captions say nothing else."""

import re

import numpy as np
import pytest
from masks import grown

from controlnet.worlds import Scenes
from controlnet.worlds.canvas import Canvas
from controlnet.worlds.classes import CLASSES
from controlnet.worlds.scenes import draw_scene
from controlnet.worlds.scenes.backdrop import draw_backdrop, sky_gradient
from controlnet.worlds.scenes.layers import Layers
from controlnet.worlds.scenes.layout import Placed, depth_at, random_things
from controlnet.worlds.scenes.paint import PAINTS, shade, tint
from controlnet.worlds.scenes.setting import SKIES, Setting, random_setting
from controlnet.worlds.scenes.things import KINDS
from ldm.config import TINY
from ldm.tokenizer import Tokenizer

SIZE, COUNT = 128, 50
GROUND = ["grass", "sand", "snow", "sea", "water"]
WORLD = Scenes(SIZE, seed=1)


@pytest.fixture(scope="module")
def scenes():
    return [WORLD.draw(i) for i in range(COUNT)]


def spec(index):
    """The setting and the things of a scene, and the random numbers that its drawing goes on with."""
    rng = WORLD.rng(index)
    setting = random_setting(rng)
    return setting, random_things(rng, setting), rng


def is_one_of(truth, names):
    """bool (H, W): where the class is one of these."""
    return np.isin(truth.classes, [CLASSES.index(name) for name in names])


def shown(truth):
    return {CLASSES[number] for number in np.unique(truth.classes)}


# ---------------------------------------------------------------------------------------------------------------- truth


def test_classes_objects_and_depth_agree(scenes):
    for scene in scenes:
        truth = scene.truth
        assert truth.objects.min() == -1 and truth.objects.max() == len(truth.things) - 1
        assert np.array_equal(scene.mask, truth.objects >= 0) and np.array_equal(scene.parts, truth.classes)
        assert np.array_equal(is_one_of(truth, KINDS), scene.mask)
        for number, thing in enumerate(truth.things):
            mask = truth.objects == number
            assert is_one_of(truth, [thing.kind])[mask].all() and np.ptp(truth.depth[mask]) == 0
        assert (truth.depth[is_one_of(truth, ["sky"])] == 1).all() and 0 <= truth.depth.min() < 0.05
        assert shown(truth) & {"grass", "snow", "sand"} <= {truth.ground, "sand"} and truth.ground in shown(truth)


def test_things_are_where_the_truth_says_and_change_nothing_elsewhere(scenes):
    """Beside the same landscape without them. On the ground there are shadows, islands and ponds."""
    for index, scene in enumerate(scenes[:20]):
        setting, _, rng = spec(index)
        canvas = Canvas(SIZE, sky_gradient(setting))
        draw_backdrop(canvas, Layers(canvas), setting, rng, rng)
        empty, _ = canvas.finish()
        changed = (scene.image != empty).any(axis=2)
        assert changed[~grown(~scene.mask)].mean() > 0.97
        assert not changed[~grown(scene.mask, by=2) & ~grown(is_one_of(scene.truth, GROUND))].any()


def test_things_have_their_colours(scenes):
    """Of a snowman it is that of hat and scarf, and persons have other colours, too."""
    for scene in scenes:
        for number, thing in enumerate(scene.truth.things):
            pixels = scene.image[scene.truth.objects == number].astype(int)
            paint = PAINTS[thing.colour]
            tones = np.array([paint, shade(paint), tint(paint)])
            share = (np.abs(pixels[:, None] - tones).max(axis=2).min(axis=1) < 6).mean()
            assert share > {"snowman": 0.05, "windmill": 0.1, "boat": 0.1, "rocket": 0.15, "person": 0.15}.get(
                thing.kind, 0.2
            ), (thing, share)


def test_colours_can_be_told_from_what_is_behind():
    for index in range(100):
        setting, things, _ = spec(index)
        assert len({thing.colour for thing in things}) == len(things)
        for thing in things:
            for behind in (*SKIES[setting.sky], setting.ground_colour):
                assert np.linalg.norm(np.subtract(behind, PAINTS[thing.colour])) > 70


def test_every_thing_is_seen_whole_enough_and_large_ones_are_twice_as_large(scenes):
    lengths, areas = {"large": [], "small": []}, []
    for scene in scenes:
        for number, thing in enumerate(scene.truth.things):
            rows, columns = np.nonzero(scene.truth.objects == number)
            areas.append(len(rows))
            lengths[thing.size].append(1 + max(np.ptp(rows), np.ptp(columns)))
    assert (np.array(areas) > 200).mean() > 0.99
    assert np.quantile(lengths["small"], 0.99) < 0.31 * SIZE < 0.38 * SIZE < np.quantile(lengths["large"], 0.01)


def test_places_are_those_of_the_image(scenes):
    for scene in scenes:
        for number, thing in enumerate(scene.truth.things):
            columns = np.nonzero(scene.truth.objects == number)[1]
            middle = (columns.min() + columns.max()) / 2 / SIZE
            low, high = {"left": (0, 0.4), "middle": (0.36, 0.64), "right": (0.6, 1)}[thing.place]
            assert low < middle < high, (thing, middle)


def test_everything_there_is_comes_about():
    settings, things = zip(*(spec(index)[:2] for index in range(200)), strict=True)
    named = [thing for several in things for thing in several]
    assert {thing.kind.name for thing in named} == set(KINDS) and len(KINDS) >= 16
    assert {thing.colour for thing in named} == set(PAINTS)
    assert {setting.sky for setting in settings} == set(SKIES)
    assert {setting.ground for setting in settings} == {"grass", "sand", "snow", "sea"}
    assert {len(several) for several in things} == {1, 2, 3, 4}


# ---------------------------------------------------------------------------------------------------------------- depth


def test_things_are_drawn_from_far_to_near_and_the_near_hide_the_far(scenes):
    for scene in scenes:
        depths = [float(scene.truth.depth[scene.truth.objects == i].mean()) for i in range(len(scene.truth.things))]
        assert depths == sorted(depths, reverse=True)
    setting = Setting("day", "grass", "nothing", 0.5, 0.5, "nothing", (0.2, 0.2), clouds=0)
    far, near = (
        Placed(KINDS[kind], colour, "large", "middle", 0.5, y, 0.5, float(depth_at(setting, y)))
        for kind, colour, y in (("castle", "red", 0.7), ("mushroom", "blue", 0.85))
    )
    truth = draw_scene(SIZE, setting, [far, near], np.random.default_rng(0)).truth
    assert CLASSES[truth.classes[int(0.6 * SIZE), SIZE // 2]] == "mushroom"  # its cap, before the gate
    assert truth.depth[truth.objects == 1].max() < truth.depth[truth.objects == 0].min()


def test_the_ground_comes_nearer_downwards_and_things_stand_at_the_depth_of_their_foot(scenes):
    for scene in scenes:
        truth = scene.truth
        on_ground = is_one_of(truth, GROUND)
        by_row = [truth.depth[row][on_ground[row]] for row in range(SIZE)]
        assert all(np.ptp(row) == 0 for row in by_row if row.size)
        rows = [row[0] for row in by_row if row.size]
        assert (np.diff(rows) <= 0).all()
        for number, thing in enumerate(truth.things):
            if KINDS[thing.kind].home == "land":
                mask = truth.objects == number
                foot = np.nonzero(mask)[0].max()
                assert (
                    abs(truth.depth[mask].mean() - 0.9 * (1 - foot / SIZE) / 0.45) < 0.15
                )  # horizons lie at 0.5 to 0.62


# ------------------------------------------------------------------------------------------------------------- captions

NOUNS = {word: kind.name for kind in KINDS.values() for word in kind.words}
PLACES = {"on the left": "left", "in the middle": "middle", "on the right": "right"}
SIZES = {"large": "large", "big": "large", "small": "small", "little": "small"}
PHRASE = re.compile(
    rf"\b(?:({'|'.join(SIZES)}) )?(?:({'|'.join(PAINTS)}) )?({'|'.join(sorted(NOUNS, key=len, reverse=True))})\b"
    rf"(?: (?:dressed )?in ({'|'.join(PAINTS)})\b| with (?:a )?({'|'.join(PAINTS)}) (?:hat and scarf|hat|scarf))?"
    rf"(?: ({'|'.join(PLACES)}))?"
)
# What else a caption may say -> when that is true.
LANDSCAPE = {
    r"with hills behind|in front of hills|hills": lambda t: t.far == "hills",
    r"with snowy mountains behind|snowy mountains": lambda t: t.far == "snowy mountains",
    r"with mountains behind|in front of mountains|mountains": lambda t: t.far.endswith("mountains"),
    r"sunny day|on a sunny day|in the sun|in sunshine|sunny|sun": lambda t: t.sky == "day" and "sun" in shown(t),
    r"in the moonlight|under the moon|moonlight|moon": lambda t: "moon" in shown(t),
    r"under a blue sky|blue sky|daytime|by day|during the day|day": lambda t: t.sky == "day",
    r"under a sunset sky|sunset sky|at sunset|sunset|in the evening|evening": lambda t: t.sky == "sunset",
    r"under a night sky|starry night|night sky|under the stars|at night|night": lambda t: t.sky == "night",
    r"in the rain|on a rainy day|rainy day|rain|under a gray sky|gray sky": lambda t: t.sky == "rain",
    r"in falling snow|while it snows|falling snow|snowing": lambda t: t.sky == "snowfall",
    r"in winter|winter|in a snowy landscape|in the snow|on snow|over the snow|snow": lambda t: t.ground == "snow",
    r"on green grass|on grass|green grass|grass|in a meadow|over a meadow|meadow": lambda t: t.ground == "grass",
    r"in the desert|over the desert|desert": lambda t: t.ground == "sand" and t.far != "sea",
    r"on a beach|at the beach|over a beach|sandy beach|beach and sea|beach": lambda t: t.ground == "sand" and sea(t),
    r"on sand|sand": lambda t: t.ground == "sand",
    r"on an island": lambda t: t.ground == "sea",
    r"by the sea|at sea|in the sea|in the water|over the sea|sea|ocean|water": lambda t: sea(t),
}


def sea(truth):
    return "sea" in (truth.ground, truth.far)


def untold(caption, truth):
    """What is left of a caption when all that is said, and is true, is taken away. Also how many things were named."""
    named = 0
    for size, colour, noun, worn, scarf, place in PHRASE.findall(caption):
        said = {"size": SIZES.get(size), "colour": colour or worn or scarf or None, "place": PLACES.get(place)}
        said = {"kind": NOUNS[noun]} | {key: value for key, value in said.items() if value}
        named += any(all(getattr(thing, key) == value for key, value in said.items()) for thing in truth.things)
    rest = PHRASE.sub("", caption)
    for words, holds in LANDSCAPE.items():
        if holds(truth):
            rest = re.sub(rf"\b(?:{words})\b", "", rest)
    return re.sub(r"\b(an|a|and)\b|,", "", rest).strip(), named


def test_captions_are_true_and_say_different_things():
    world = Scenes(32, seed=2)
    scenes = [world.draw(i) for i in range(150)]
    counts = []
    for scene in scenes:
        rest, named = untold(scene.caption, scene.truth)
        assert rest == "" and named == len(PHRASE.findall(scene.caption)) >= 1, (
            scene.caption,
            rest,
            scene.truth.things,
        )
        counts.append((named, len(scene.truth.things)))
    named, there = np.array(counts).T
    assert 0.15 < (named < there).mean() < 0.6  # not every thing is named
    words = [len(scene.caption.split()) for scene in scenes]
    assert min(words) <= 2 and max(words) > 20
    for said in ("on the left", "large ", " night", "sunset", "sea", "mountains", "with a ", "and ", ", "):
        assert 0.03 < np.mean([said in scene.caption for scene in scenes]) < 0.9, said


def test_false_captions_would_be_found():
    truths = (Scenes(16).draw(i).truth for i in range(99))
    truth = next(t for t in truths if t.sky == "day" and t.things[0].kind == "house")
    thing = truth.things[0]
    other = next(colour for colour in PAINTS if colour != thing.colour)
    assert untold(f"a {thing.colour} house by day", truth) == ("", 1)
    assert untold(f"a {other} house by day", truth) == ("", 0) and untold("a house at night", truth) == ("at night", 1)
    assert untold("a house and a moose", truth)[0] == "moose"


def test_captions_are_short_for_the_tokenizer_and_none_of_their_words_is_lost():
    world, tokenizer = Scenes(16, seed=3), Tokenizer(TINY.text)
    for i in range(100):
        caption = world.draw(i).caption
        ids = tokenizer.encode(caption)
        assert 1 <= len(ids) < 60
        assert re.sub(" ", "", tokenizer.decode(ids)) == re.sub(" ", "", caption)
