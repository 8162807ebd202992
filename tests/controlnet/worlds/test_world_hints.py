"""Hints made of pictures and their truth: incomplete scribbles along the outlines, ADE20K's colours, near is white."""

import numpy as np
import pytest
from masks import grown

from controlnet.hints.ade20k import ADE20K
from controlnet.worlds import Depth, People, Scenes, Scribble, Seg, Shapes
from controlnet.worlds.classes import ADE20K_CLASSES, CLASSES
from controlnet.worlds.hints import depth, scribble, segmentation
from controlnet.worlds.scenes.things import KINDS


def outlines(parts):
    lines = np.zeros(parts.shape, bool)
    lines[1:] |= parts[1:] != parts[:-1]
    lines[:, 1:] |= parts[:, 1:] != parts[:, :-1]
    return lines


@pytest.mark.parametrize("world", [Scenes, Shapes, People])
def test_scribbles_follow_the_outlines_and_leave_some_out(world):
    drawn = []
    for i in range(12):
        picture = world(128).draw(i)
        hint = scribble(picture, np.random.default_rng(i))
        assert hint.shape == (128, 128, 3) and hint.dtype == np.uint8 and (hint == hint[..., :1]).all()
        strokes, lines = hint[..., 0] > 127, outlines(picture.parts)
        assert hint.max() == 255 and strokes.mean() < 0.35
        assert grown(lines, 6)[strokes].mean() > 0.99  # a wobble of up to 2.5 % of the side, and the brush
        assert strokes.sum() > 1.2 * lines[grown(strokes, 4)].sum()  # thick
        drawn.append(grown(strokes, 2)[lines].mean())
        assert not np.array_equal(hint, scribble(picture, np.random.default_rng(i + 1)))
    assert 0.8 < np.mean(drawn) < 0.97 and min(drawn) > 0.5  # without gaps it is 0.999


def test_scribbles_wobble():
    picture = Shapes(128).draw(5)
    hints = [scribble(picture, np.random.default_rng(i))[..., 0] > 127 for i in range(4)]
    lines = outlines(picture.parts)
    assert all(grown(lines, 1)[strokes].mean() < 0.9 for strokes in hints)


def test_every_sample_is_scribbled_with_another_hand():
    dataset = Scribble(64, seed=1)
    picture, hint = dataset.draw(4), dataset[4].hint
    assert np.array_equal(hint, scribble(picture, dataset.rng(4)))
    for other in (dataset.rng(5), Scribble(64, seed=2).rng(4), Scribble(64, seed=1, held_out=True).rng(4)):
        assert not np.array_equal(hint, scribble(picture, other))


def test_segmentation_has_the_classes_in_the_colours_of_ade20k():
    assert set(KINDS) < set(ADE20K_CLASSES)
    published = {"sky": (6, 230, 230), "tree": (4, 200, 3), "grass": (4, 250, 7), "house": (255, 9, 224)}
    published |= {"person": (150, 5, 61), "car": (0, 102, 200), "sea": (9, 7, 230), "sand": (160, 150, 20)}
    for name, colour in published.items():  # as listed beside the names in the benchmark's table
        assert tuple(ADE20K[ADE20K_CLASSES[name]]) == colour
    for i in range(15):
        picture = Scenes(64).draw(i)
        hint = segmentation(picture)
        assert hint.dtype == np.uint8 and hint.shape == (64, 64, 3)
        for number in np.unique(picture.truth.classes):
            colours = hint[picture.truth.classes == number]
            assert (colours == ADE20K[ADE20K_CLASSES[CLASSES[number]]]).all()


def test_what_ade20k_does_not_know_has_a_colour_of_its_own():
    own = ("snow", "windmill", "lighthouse", "umbrella", "mushroom", "rocket", "balloon", "snowman")
    colours = {name: tuple(ADE20K[number].tolist()) for name, number in ADE20K_CLASSES.items()}
    for name in own:
        others = [colour for other, colour in colours.items() if other != name]
        assert min(np.abs(np.subtract(colour, colours[name])).max() for colour in others) > 40, name


def test_depth_is_white_where_it_is_near():
    for i in range(15):
        picture = Scenes(64).draw(i)
        hint = depth(picture).astype(int)
        assert (hint == hint[..., :1]).all() and (hint[picture.parts == CLASSES.index("sky")] == 0).all()
        order = np.argsort(picture.truth.depth.ravel())
        assert (np.diff(hint[..., 0].ravel()[order]) <= 0).all()  # never brighter where it is farther
        assert hint[-1].min() > 200


@pytest.mark.parametrize("dataset, hint", [(Seg, segmentation), (Depth, depth)])
def test_the_datasets_have_these_hints(dataset, hint):
    samples = dataset(64, seed=3)
    sample = samples[2]
    assert np.array_equal(sample.hint, hint(samples.draw(2))) and sample.truth is not None
