"""The measures find what was drawn, and do not find what was not."""

import numpy as np
import pytest
import torch

from controlnet.worlds import Fill50k, People, Shapes
from controlnet.worlds.colours import BASIC_COLOURS, COLOURS
from controlnet.worlds.fill50k import draw_circle
from controlnet.worlds.measures import (
    colour_agreement,
    foreground,
    iou,
    keypoint_distance,
    mean_iou,
    nearest_colour,
    palette_distance,
    psnr,
    same_colour,
    split_disc,
)


def test_discs_and_colours_are_read_off_true_images():
    world = Fill50k(128, colours=BASIC_COLOURS)
    for i in range(20):
        sample = world[i]
        mask, disc, ground = split_disc(sample.image)
        assert iou(mask, sample.mask) > 0.95
        names = [nearest_colour(colour, BASIC_COLOURS) for colour in (disc, ground)]
        assert f"{names[0]} circle with {names[1]} background" == sample.caption


def test_the_disc_is_found_under_noise():
    sample = draw_circle(128, 40, 70, 25, "teal", "pink")
    noisy = sample.image + np.random.default_rng(0).normal(0, 12, sample.image.shape)
    mask, _, _ = split_disc(noisy.clip(0, 255).astype(np.uint8))
    assert iou(mask, sample.mask) > 0.95


def test_an_image_without_a_disc_has_an_empty_mask():
    noise = np.random.default_rng(0).normal(128, 5, (64, 64, 3)).astype(np.uint8)
    mask, disc, ground = split_disc(noise)
    assert not mask.any() and np.array_equal(disc, ground)
    assert iou(mask, draw_circle(64, 32, 32, 20, "red", "blue").mask) == 0


def test_other_images_discs_are_no_match():
    samples = [Fill50k(64)[i] for i in range(40)]
    floor = np.mean([iou(a.mask, b.mask) for a, b in zip(samples, samples[1:], strict=False)])
    assert floor < 0.3


def test_iou_of_known_masks():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[1:3] = True, True
    assert iou(a, b) == pytest.approx(4 / 12)
    assert iou(a, a) == iou(a & False, a & False) == 1


def test_the_mean_iou_is_that_of_the_masks_that_are_there():
    true = np.full((4, 4), -1)
    true[:2], true[2, :2] = 0, 3
    shown = true.copy()
    shown[0], shown[3] = 3, 7  # of 0, half is left; of 3, two of its six pixels are right; 7 is nowhere in the truth
    assert mean_iou(shown, true) == pytest.approx((1 / 2 + 2 / 6) / 2)
    assert mean_iou(true, true) == 1 and mean_iou(np.full((4, 4), 5), true) == 0


def test_colours_with_two_names_are_the_same():
    assert same_colour("aqua", "cyan") and not same_colour("navy", "blue")
    assert all(same_colour(nearest_colour(np.array(value), tuple(COLOURS)), name) for name, value in COLOURS.items())


def test_psnr_of_a_known_difference():
    a = torch.zeros(2, 3, 8, 8)
    assert psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)  # a tenth of the range


def test_palettes_are_compared_wherever_their_colours_are():
    image, other = Shapes(32)[0].image, Shapes(32)[1].image
    assert palette_distance(image, image[::-1, ::-1]) == 0 < palette_distance(image, other)
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    half = np.concatenate([black[:2], white[:2]])
    assert palette_distance(black, half) == pytest.approx(palette_distance(black, white) / 2)
    assert palette_distance(image, other) == palette_distance(other, image)


def test_the_foreground_of_true_images_is_their_figures():
    for world in (Fill50k(128, colours=BASIC_COLOURS), People(128), Shapes(128)):
        assert np.mean([iou(foreground(s.image), s.mask) for s in map(world.draw, range(20))]) > 0.9


def test_the_foreground_is_found_where_its_colour_is_near_the_grounds_and_not_in_noise():
    near = draw_circle(64, 30, 30, 20, "sky blue", "light blue")  # 40 of 255 apart
    assert iou(foreground(near.image), near.mask) > 0.95
    assert not foreground(np.random.default_rng(0).integers(120, 130, (64, 64, 3))).any()


def test_key_points_of_true_images_lie_on_the_figure_and_other_peoples_do_not():
    samples = [People(128).draw(i) for i in range(20)]
    own = [keypoint_distance(foreground(s.image), s.keypoints) for s in samples]
    others = [keypoint_distance(foreground(a.image), b.keypoints) for a, b in zip(samples, samples[1:], strict=False)]
    assert np.mean(own) < 0.5 and np.mean(others) > 8 * np.mean(own)


def test_key_point_distances_are_in_pixels():
    mask = np.zeros((20, 40), bool)
    mask[5, 10] = True
    points = np.array([[10.5, 5.5], [10.5, 12.5]])  # the pixel itself, and seven below
    assert keypoint_distance(mask, points) == pytest.approx((7 - 0.5**0.5) / 2)
    assert keypoint_distance(~mask & mask, points) == pytest.approx(np.hypot(20, 40))


def test_colours_agree_with_themselves_under_a_little_noise_and_not_with_others():
    a, b = (draw_circle(64, 30, 30, 20, *names) for names in (("red", "white"), ("blue", "white")))
    noisy = (a.image.astype(int) + np.random.default_rng(0).integers(-9, 10, a.image.shape)).clip(0, 255)
    assert colour_agreement(noisy.astype(np.uint8), a.image, a.mask) > 0.97
    assert colour_agreement(b.image, a.image, a.mask) < 0.03
    assert colour_agreement(b.image, a.image, ~a.mask) > 0.97
