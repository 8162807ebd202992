"""The procedural fill50k: the same picture for the same index, drawn as its caption and its hint say."""

import numpy as np

from controlnet.colours import BASIC_COLOURS, COLOURS
from controlnet.worlds import Fill50k, draw_circle


def test_a_sample_depends_on_its_seed_and_index_alone():
    world, again = Fill50k(64, seed=3), Fill50k(64, seed=3)
    _ = [again[i] for i in range(5)]
    assert np.array_equal(world[7].image, again[7].image) and world[7].caption == again[7].caption
    others = [world[8], Fill50k(64, seed=4)[7], Fill50k(64, seed=3, held_out=True)[7]]
    assert all(not np.array_equal(world[7].hint, other.hint) for other in others)


def test_a_picture_has_the_colours_of_its_caption():
    for i in range(20):
        sample = Fill50k(64)[i]
        disc, ground = sample.caption.removesuffix(" background").split(" circle with ")
        assert disc != ground
        inside, outside = ~grown(~sample.mask), ~grown(sample.mask)
        assert inside.any() and (sample.image[inside] == COLOURS[disc]).all()
        assert outside.any() and (sample.image[outside] == COLOURS[ground]).all()


def grown(mask):
    """A mask and the pixels beside it: those that the disc's edge may share with the ground."""
    shifts = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    return np.logical_or.reduce([np.roll(mask, shift, (0, 1)) for shift in shifts])


def test_the_hint_is_a_thin_white_circle_on_black_around_the_disc():
    sample = draw_circle(128, 50, 60, 30, "red", "blue")
    rows, columns = np.mgrid[:128, :128] + 0.5
    distance = np.abs(np.hypot(columns - 50, rows - 60) - 30)
    assert (sample.hint[distance < 0.2] == 255).all() and (sample.hint[distance > 1.3] == 0).all()
    assert (sample.hint[..., 0] == sample.hint[..., 2]).all()
    assert abs(sample.mask.sum() - np.pi * 30**2) < 20
    assert (sample.mask == (sample.image[..., 0] > 127)).mean() > 0.999


def test_circles_may_leave_the_frame_and_never_fill_it():
    masks = [Fill50k(64)[i].mask for i in range(100)]
    assert any(mask[0].any() or mask[:, 0].any() for mask in masks)
    assert all(0.005 < mask.mean() < 0.6 for mask in masks)


def test_there_are_the_140_colours_of_css_without_its_second_spellings():
    assert len(COLOURS) == 140 and not any("grey" in name for name in COLOURS)
    assert len(set(COLOURS.values())) == 138  # aqua is cyan, fuchsia is magenta
    assert set(BASIC_COLOURS) <= set(COLOURS) and len({COLOURS[name] for name in BASIC_COLOURS}) == 22
