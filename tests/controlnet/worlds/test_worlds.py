"""The procedural worlds: the same image for the same index, drawn as its caption and its hint say."""

import re
from itertools import combinations

import numpy as np
import pytest
from masks import grown

from controlnet.hints.pose import draw_pose
from controlnet.worlds import WORLDS, Fill50k, People, Scenes, Shapes
from controlnet.worlds.colours import BASIC_COLOURS, COLOURS
from controlnet.worlds.fill50k import draw_circle
from controlnet.worlds.person import HAIR
from controlnet.worlds.world import luma


@pytest.mark.parametrize("kind", WORLDS.values(), ids=WORLDS)
def test_a_sample_depends_on_its_seed_and_index_alone(kind):
    world, again = kind(64, seed=3), kind(64, seed=3)
    _ = [again[i] for i in range(5)]
    assert np.array_equal(world[7].image, again[7].image) and world[7].caption == again[7].caption
    others = [world[8], world[9], kind(64, seed=4)[7], kind(64, seed=3, held_out=True)[7]]
    assert all(not np.array_equal(world[7].hint, other.hint) for other in others)


PERSON = re.compile(r"(?:bald )?person(?: with .+)? in (.+) shirt and (.+) trousers with (.+) background")


def words_of(caption):
    """What a caption says of the figures, and the ground's colour."""
    if found := PERSON.fullmatch(caption):
        shirt, trousers, ground = found.groups()
        return f"{shirt} {trousers}", ground
    return caption.removesuffix(" background").split(" with ")


@pytest.mark.parametrize("kind", [Fill50k, People, Shapes])
def test_images_are_flat_figures_of_the_captions_colours_on_its_ground(kind):
    world = kind(64, colours=BASIC_COLOURS)
    for i in range(20):
        sample = world[i]
        assert sample.image.shape == sample.hint.shape == (64, 64, 3) and sample.image.dtype == np.uint8
        figure, ground = words_of(sample.caption)
        away = ~grown(grown(sample.mask))  # a star's tips are thinner than a pixel
        assert away.any() and (sample.image[away] == COLOURS[ground]).all()
        inside = sample.image[~grown(~sample.mask)]
        named = [name for name in BASIC_COLOURS if name in figure.replace(",", "").split()]
        shares = [(inside == COLOURS[name]).all(axis=1).mean() for name in named]
        assert named and all(share > 0.01 for share in shares)
        assert sum(shares) > (0.3 if kind is People else 0.85)  # people have skin, hair and shoes too


def test_an_image_has_the_colours_of_its_caption():
    for i in range(20):
        sample = Fill50k(64)[i]
        disc, ground = sample.caption.removesuffix(" background").split(" circle with ")
        assert disc != ground
        inside, outside = ~grown(~sample.mask), ~grown(sample.mask)
        assert inside.any() and (sample.image[inside] == COLOURS[disc]).all()
        assert outside.any() and (sample.image[outside] == COLOURS[ground]).all()


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
    assert COLOURS["light golden rod yellow"] == (250, 250, 210) and sum(map(sum, COLOURS.values())) == 66498
    assert set(BASIC_COLOURS) <= set(COLOURS) and len({COLOURS[name] for name in BASIC_COLOURS}) == 22


def test_people_are_whole_and_lie_where_their_hint_says():
    world = People(64)
    for i in range(50):
        sample = world[i]
        assert sample.keypoints.shape == (18, 2)
        assert (sample.keypoints >= 0).all() and (sample.keypoints <= 64).all()
        x, y = np.floor(sample.keypoints).astype(int).clip(0, 63).T
        assert sample.mask[y, x].mean() > 0.85  # ears lie on the outline
        assert np.array_equal(sample.hint, draw_pose(sample.keypoints, (64, 64)))
        assert 0.05 < sample.mask.mean() < 0.5


def test_people_face_us_and_stand_on_their_feet():
    for i in range(50):
        points = People(1).draw(i).keypoints
        assert points[2, 0] < points[5, 0] and points[8, 0] < points[11, 0]  # their right is our left
        assert points[0, 1] < points[1, 1] < points[[8, 11], 1].min()  # nose above neck above hips
        assert (points[[9, 12], 1] > points[[8, 11], 1]).all()  # knees below hips


def test_poses_differ_widely():
    hands = np.array([(p := People(1).draw(i).keypoints)[[4, 7], 1] - p[1, 1] for i in range(100)])
    assert (hands < 0).mean() > 0.2 and (hands > 0).mean() > 0.2  # above the neck and below it


def test_shapes_are_one_to_three_and_all_kinds_and_their_hints_are_edges():
    samples = [Shapes(64)[i] for i in range(60)]
    counts = [sample.caption.count(",") + sample.caption.count(" and ") + 1 for sample in samples]
    assert set(counts) == {1, 2, 3}
    assert all(any(kind in s.caption for s in samples) for kind in ("circle", "square", "triangle", "star"))
    for sample in samples:
        outline = grown(sample.mask) & grown(~sample.mask)  # of the union of the shapes
        assert set(np.unique(sample.hint)) == {0, 255}
        assert (sample.hint[..., 0][outline] > 0).mean() > 0.25  # it is two or three pixels wide, an edge one
        flat = ~grown(grown(sample.mask))
        assert not sample.hint[flat].any()


def test_neighbouring_colours_can_be_told_apart():
    for world in (Shapes(16), People(16)):
        for i in range(30):
            words = world[i].caption
            found = PERSON.fullmatch(words)
            names = found.groups() if found else re.sub(" (circle|square|triangle|star|background)", "", words)
            names = names if found else re.split(", | and | with ", names)
            colours = [COLOURS[name] for name in names]
            assert len(colours) >= 2
            for a, b in combinations(colours, 2):
                assert np.linalg.norm(np.subtract(a, b)) >= 80 and abs(luma(a) - luma(b)) >= 30


def test_the_shirt_is_above_the_trousers():
    for i in range(20):
        sample = People(128, colours=BASIC_COLOURS).draw(i)
        shirt, trousers, _ = PERSON.fullmatch(sample.caption).groups()
        points = sample.keypoints
        arm, knee = 0.6 * points[2] + 0.4 * points[3], points[9]
        assert tuple(sample.image[int(arm[1]), int(arm[0])]) == COLOURS[shirt]
        assert tuple(sample.image[int(knee[1]), int(knee[0])]) == COLOURS[trousers]


def test_people_have_the_hair_and_the_hats_of_their_captions():
    captions = [People(16, seed=1).draw(i).caption for i in range(300)]
    assert 0.55 < np.mean([caption.startswith("person in ") for caption in captions]) < 0.85
    for words in (
        "bald person in",
        "long red hair",
        "curly black hair",
        "a top hat and",
        "a straw hat",
        "a cap",
        "a hat",
    ):
        assert any(words in caption for caption in captions), words
    for i, caption in enumerate(captions[:60]):
        shown = People(64, seed=1).draw(i).image.reshape(-1, 3)
        seen = {name for name, colour in HAIR.items() if (shown == colour).all(axis=1).sum() > 3}
        named = {name for name in HAIR if f"{name} hair" in caption}
        assert not named or seen == named
        assert "bald" not in caption or not seen


@pytest.mark.parametrize("name", ["canny", "scribble"])
def test_other_datasets_take_pictures_of_the_worlds_in_turn(name):
    dataset = WORLDS[name](32, 5, held_out=True)
    for i in range(6):
        world = (Scenes, Shapes, People)[i % 3](32, 5, held_out=True)
        assert np.array_equal(dataset[i].image, world[i // 3].image) and dataset[i].caption == world[i // 3].caption
        if name == "canny" and i % 3 < 2:
            assert np.array_equal(dataset[i].hint, world[i // 3].hint)
