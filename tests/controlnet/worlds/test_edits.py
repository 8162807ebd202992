"""Scenes before and after a change: what the instruction names has changed, and nothing else."""

import numpy as np
import pytest
from masks import grown

from controlnet.worlds import Edits
from controlnet.worlds.edits import SKY_WORDS
from controlnet.worlds.scenes.paint import PAINTS, shade, tint

SIZE = 64


@pytest.fixture(scope="module")
def pairs():
    world = Edits(SIZE, seed=2)
    return [world.pair(i) for i in range(60)]


def test_a_thing_gets_the_colour_that_it_is_told_and_all_else_stays(pairs):
    of_things = [pair for pair in pairs if pair[0].truth.sky == pair[1].truth.sky]
    assert 20 < len(of_things) < 50
    for before, after in of_things:
        ((number, thing),) = [
            (i, now)
            for i, (was, now) in enumerate(zip(before.truth.things, after.truth.things, strict=True))
            if was != now
        ]
        assert after.caption.startswith("make it a") and thing.kind in after.caption and thing.colour in after.caption
        there = (before.truth.objects == number) | (after.truth.objects == number)
        place = grown(there, by=2)  # its edge, and a shadow's rim
        assert (before.image != after.image).any() and np.array_equal(before.image[~place], after.image[~place])
        tones = np.array([PAINTS[thing.colour], shade(PAINTS[thing.colour]), tint(PAINTS[thing.colour])])
        pixels = after.image[after.truth.objects == number].astype(int)
        assert (np.abs(pixels[:, None] - tones).max(axis=2).min(axis=1) < 6).mean() > 0.03  # of a snowman, its scarf


def test_another_sky_is_over_the_same_land_and_things(pairs):
    of_skies = [pair for pair in pairs if pair[0].truth.sky != pair[1].truth.sky]
    assert {after.truth.sky for _, after in of_skies} == set(SKY_WORDS)
    for before, after in of_skies:
        assert after.caption == f"make it {SKY_WORDS[after.truth.sky]}"
        assert before.truth.things == after.truth.things and before.truth.ground == after.truth.ground
        assert np.array_equal(before.truth.objects, after.truth.objects)
        top = (before.image[0] != after.image[0]).any(axis=1)
        assert top.mean() > 0.9
        land = [truth.depth < 0.9 for truth in (before.truth, after.truth)]
        assert np.array_equal(*land)


def test_the_hint_is_the_picture_before(pairs):
    sample = Edits(SIZE, seed=2)[3]
    before, after = pairs[3]
    assert np.array_equal(sample.hint, before.image) and np.array_equal(sample.image, after.image)
    assert sample.caption == after.caption
