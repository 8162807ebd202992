"""Hints from photographs and poses, against OpenCV's stored numbers, direct computations and symmetries."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from controlnet.hints import (
    DETECTORS,
    NotInstalledError,
    detect,
    detect_file,
    find_detector,
    inpaint,
    inpaint_at_random,
    options_of,
    parse_detector,
)
from controlnet.hints.canny import canny, connected, to_gray
from controlnet.hints.detectors import ALIASES, parse_options
from controlnet.hints.filters import fetched, pyramid_up, smooth_noise
from controlnet.hints.learned import annotator, segmenter
from controlnet.hints.openpose import read_pose
from controlnet.hints.pose import COLOURS, HAND_COLOURS, HAND_LIMBS, LIMBS, draw_pose

FIXTURES = Path(__file__).parents[2] / "fixtures" / "hints"
LEARNED = ("hed", "mlsd", "midas", "openpose", "lineart", "sam")


@pytest.fixture(scope="module")
def opencv():
    with np.load(FIXTURES / "opencv.npz") as stored:
        return dict(stored)


def photograph(name="cat"):
    return np.asarray(Image.open(FIXTURES / f"{name}.webp").convert("RGB"))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------- canny


@pytest.mark.parametrize("kind, cases", [("canny", 78), ("colour canny", 39)])
def test_canny_is_opencvs_to_the_bit(opencv, kind, cases):
    """On noise of all sizes and three photographs, at several thresholds; of gray images and of colours."""
    keys = [key for key in opencv if key.startswith(f"{kind}/")]
    assert len(keys) == cases and {key.split("/")[1] for key in keys} >= {"cat", "coffee", "rocket", "two values"}
    for key in keys:
        _, name, low, high = key.split("/")
        picture = opencv.get(f"picture/{name}")
        picture = photograph(name) if picture is None else picture
        edges = canny(picture, float(low), float(high), colour=kind == "colour canny")
        assert edges.dtype == np.uint8 and edges.shape == picture.shape[:2] and set(np.unique(edges)) <= {0, 255}
        assert np.array_equal(np.packbits(edges > 0), opencv[key]), key


def test_the_detector_hands_its_options_on():
    image = photograph()
    for options in ({}, {"low": 20.0}, {"high": 90.0}, {"low": 20.0, "high": 60.0, "colour": True}):
        assert np.array_equal(detect("canny", image, **options)[..., 1], canny(image, **options))
    assert len({detect("canny", image, high=high).sum() for high in (100.0, 200.0, 400.0)}) == 3


def test_colours_of_equal_lightness_have_an_edge_only_in_colour():
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    image[:, :10], image[:, 10:] = (255, 0, 0), (0, 130, 0)
    assert np.ptp(to_gray(image)) <= 1
    assert not detect("canny", image).any()
    assert detect("canny", image, colour=True)[:, 9:11].any(axis=1).all()


def test_gray_is_opencvs_to_the_bit(opencv):
    assert np.array_equal(to_gray(opencv["gray/colours"]), opencv["gray/values"])
    assert np.array_equal(detect("gray", opencv["gray/colours"])[..., 2], opencv["gray/values"])


def test_a_chain_of_candidates_is_followed_to_its_end():
    """A spiral of one pixel's width, from a seed in its middle."""
    spiral = np.zeros((41, 41), dtype=bool)
    y, x, step = 20, 20, (0, 1)
    for length in range(2, 40, 2):
        for _ in range(2):
            for _ in range(length):
                spiral[y, x] = True
                y, x = y + step[0], x + step[1]
            step = (step[1], -step[0])
    spiral[20, 21] = False  # so that the first pixel is cut off from the rest
    seeds = np.zeros_like(spiral)
    seeds[20, 22] = True
    reached = connected(spiral, seeds)
    assert reached.sum() == spiral.sum() - 1 and not reached[20, 20]
    assert not connected(spiral, np.zeros_like(spiral)).any()


# ---------------------------------------------------------------------------------------------------- pose


def person(scale=1.0):
    """The person of the stored image, (18, 3), at `scale` times 512 pixels."""
    with np.load(FIXTURES / "opencv.npz") as stored:
        points = stored["pose/keypoints"] * scale
    return np.concatenate([points, np.ones((18, 1))], axis=1)


def test_a_pose_is_drawn_like_the_published_ones(opencv):
    """OpenCV's shapes have whole pixels, ours soft edges: beyond these nothing differs, nor any colour."""
    published, drawn = opencv["pose/picture"], draw_pose(opencv["pose/keypoints"], (512, 512))
    lit = published.max(axis=2) > 0
    clearly = drawn.max(axis=2) > 80
    assert (lit & clearly).sum() / (lit | clearly).sum() > 0.85
    assert abs(drawn.sum() / published.sum() - 1) < 0.03
    for i, (x, y) in enumerate(opencv["pose/keypoints"].astype(int)):
        assert np.array_equal(drawn[y, x], published[y, x]), f"joint {i}"
    middles = np.array([opencv["pose/keypoints"][list(limb)].mean(axis=0) for limb in LIMBS[:13]]).astype(int)
    assert np.array_equal(drawn[middles[:, 1], middles[:, 0]], published[middles[:, 1], middles[:, 0]])


def test_hands_and_faces_are_drawn_like_the_published_ones(opencv):
    """Fingers in all hues from red, joints blue, faces white; with OpenCV's shapes as above."""
    published, hands, face = (opencv[f"pose/{name}"] for name in ("hands and face", "hands", "face"))
    drawn = draw_pose(np.zeros((0, 18, 3)), (512, 512), hands, [face])
    lit, clearly = published.max(axis=2) > 0, drawn.max(axis=2) > 80
    assert (lit & clearly).sum() / (lit | clearly).sum() > 0.8
    for x, y in hands.astype(int).reshape(-1, 2):
        assert drawn[y, x].tolist() == published[y, x].tolist() == [0, 0, 255]
    for x, y in face.astype(int):
        assert drawn[y, x].tolist() == published[y, x].tolist() == [255, 255, 255]
    for (start, end), colour in zip(HAND_LIMBS, HAND_COLOURS, strict=True):
        x, y = (hands[0][start].astype(int) + hands[0][end].astype(int)) // 2
        assert np.abs(drawn[y, x] - published[y, x].astype(int)).max() <= 1
        assert np.abs(drawn[y, x] - colour).max() <= 1
    assert not drawn[-1].any() and np.array_equal(drawn, draw_pose(np.zeros((0, 18, 3)), (512, 512), hands, [face]))


def test_a_missing_finger_takes_its_lines_along(opencv):
    hand = np.column_stack([opencv["pose/hands"][0], np.ones(21)])
    lacking = hand.copy()
    lacking[6, 2] = 0
    drawn = [draw_pose(np.zeros((0, 18, 3)), (512, 512), [one]).astype(int) for one in (hand, lacking)]
    difference = np.abs(drawn[0] - drawn[1]).max(axis=2)
    for a, b in ((5, 6), (6, 7)):
        x, y = ((hand[a, :2] + hand[b, :2]) / 2).astype(int)
        assert difference[y, x] > 50
    assert not difference[int(hand[0, 1]) - 5 :].any()  # the other lines, which begin at the wrist


def test_limbs_join_all_joints_and_no_two_have_a_colour():
    reached = {0}
    for _ in LIMBS:
        reached |= {b for a, b in LIMBS if a in reached} | {a for a, b in LIMBS if b in reached}
    assert reached == set(range(18)) and len(LIMBS) == 17
    assert len({tuple(colour) for colour in COLOURS}) == 18


def test_a_small_pose_is_a_large_one_averaged():
    """Lines of two pixels' width have the brightness they should: no joint falls between pixels."""
    small = draw_pose(person(0.25), (128, 128)).astype(float)
    large = draw_pose(person(4.0), (2048, 2048)).reshape(128, 16, 128, 16, 3).mean(axis=(1, 3))
    assert np.abs(small - large).mean() < 0.3
    assert abs(small.sum() / large.sum() - 1) < 0.08


@pytest.mark.parametrize("missing", [np.nan, 0.0])
def test_a_missing_keypoint_takes_its_limbs_along(missing):
    whole, lacking = person(), person()
    lacking[3] = (lacking[3, 0], lacking[3, 1], missing)  # the right elbow
    difference = np.abs(draw_pose(whole, (512, 512)).astype(int) - draw_pose(lacking, (512, 512))).max(axis=2)
    for a, b in ((2, 3), (3, 4)):
        x, y = (whole[a, :2] + whole[b, :2]) // 2
        assert difference[int(y), int(x)] > 50
    left, top = whole[[2, 3, 4], :2].min(axis=0) - 6
    right, bottom = whole[[2, 3, 4], :2].max(axis=0) + 6
    rows, columns = np.nonzero(difference)
    assert rows.min() > top and rows.max() < bottom and columns.min() > left and columns.max() < right
    without = person()[:, :2]
    without[3] = np.nan
    assert np.array_equal(draw_pose(without, (512, 512)), draw_pose(lacking, (512, 512)))


def test_people_beside_each_other_are_drawn_as_alone():
    first, second = person(0.25), person(0.25) + (128, 0, 0)
    both = draw_pose(np.stack([first, second]), (128, 256))
    assert np.array_equal(both, draw_pose(first, (128, 256)) + draw_pose(second, (128, 256)))
    assert not draw_pose(np.zeros((0, 18, 3)), (64, 64)).any()


def test_long_lines_are_drawn_as_on_a_small_canvas():
    """There all pixels around a line are looked at, on a large one only those near it."""
    rng = np.random.default_rng(0)
    for body, hand in zip(rng.uniform(-20, 80, (20, 18, 2)), rng.uniform(-20, 80, (20, 21, 2)), strict=True):
        body[::3] = np.round(body[::3] / 20) * 20  # some are level, some upright
        with pytest.MonkeyPatch.context() as patch:
            drawn = draw_pose(body, (60, 50), [hand])
            patch.setattr("controlnet.hints.pose.LARGE", 0)
            assert np.array_equal(draw_pose(body, (60, 50), [hand]), drawn) and drawn.any()


def test_a_pose_that_leaves_the_image_is_cut_off():
    moved = person(0.25) + (70, -20, 0)
    assert np.array_equal(draw_pose(moved, (128, 128)), draw_pose(moved, (128, 256))[:, :128])
    assert not draw_pose(person() + (1e6, 0, 0), (64, 64)).any()


def test_keypoints_of_another_shape_are_refused():
    for shape in ((17, 3), (18, 4), (25, 3), (18,), (1, 1, 18, 3)):
        with pytest.raises(ValueError, match="keypoints have the shape"):
            draw_pose(np.ones(shape), (64, 64))


# ---------------------------------------------------------------------------------------------------- OpenPose's files


def pose_file(folder, people, **canvas):
    path = folder / "pose.json"
    path.write_text(json.dumps({"people": [{"pose_keypoints_2d": numbers} for numbers in people], **canvas}))
    return path


CANVAS = {"canvas_width": 512, "canvas_height": 512}


def test_both_orders_of_openpose_draw_the_same_person(tmp_path):
    coco = person()
    body_25 = np.full((25, 3), 7.0)  # the feet and the middle of the hips are nobody's
    names_25 = "0 1 2 3 4 5 6 7 9 10 11 12 13 14 15 16 17 18"  # OpenPose's documentation, "Keypoint Ordering"
    body_25[[int(i) for i in names_25.split()]] = coco
    expected = draw_pose(coco, (512, 512))
    for keypoints in (coco, body_25):
        path = pose_file(tmp_path, [keypoints.ravel().tolist(), [], None], **CANVAS)
        assert np.array_equal(detect_file("pose", path), expected)


def test_the_canvas_is_the_files_or_the_callers(tmp_path):
    numbers = person().ravel().tolist()
    assert detect_file("pose", pose_file(tmp_path, [numbers], canvas_width=640, canvas_height=480)).shape[:2] == (
        480,
        640,
    )
    with pytest.raises(ValueError, match="at most 16384 pixels"):
        detect_file("pose", pose_file(tmp_path, [numbers], canvas_width=640, canvas_height=48000))
    with pytest.raises(ValueError, match="is 9000x9000, expected at most .* and 20 million in all"):
        detect_file("pose", pose_file(tmp_path, [numbers], canvas_width=9000, canvas_height=9000))
    bare = pose_file(tmp_path, [numbers])
    assert np.array_equal(detect_file("pose", bare, height=512, width=512), draw_pose(person(), (512, 512)))


def test_a_pose_without_a_canvas_lies_in_the_middle_of_one(tmp_path):
    points = person()[:, :2]
    width, height = np.ceil(points.min(axis=0) + points.max(axis=0)).astype(int).tolist()
    with pytest.warns(UserWarning, match=f'taking {width}x{height} .*"pose:width={width},height={height}"'):
        hint = detect_file("pose", pose_file(tmp_path, [person().ravel().tolist()]))
    assert np.array_equal(hint, draw_pose(person(), (height, width)))
    with pytest.warns(UserWarning, match="taking 512x512"):
        hint = detect_file("pose", pose_file(tmp_path, [(person() / (512, 512, 1)).ravel().tolist()]))
    assert np.array_equal(hint, draw_pose(person(), (512, 512)))


def parts(values):
    return np.array(values) / ([512, 512, 1][: np.shape(values)[-1]])


def flat(values):
    return np.ravel(values).tolist()


BODY, POINTS, SIDES = person(), person()[:, :2], {"width": 512, "height": 512}
LAYOUTS = {  # file, and how many people are in it
    "canvas": ({"people": [{"pose_keypoints_2d": flat(BODY)}], **CANVAS}, 1),
    "width and height": ({"people": [{"pose_keypoints_2d": flat(BODY)}], **SIDES}, 1),
    "sides as text": ({"people": [{"pose_keypoints_2d": flat(BODY)}], "width": "512", "height": "512.0"}, 1),
    "parts of the canvas": ({"people": [{"pose_keypoints_2d": flat(parts(BODY))}], **CANVAS}, 1),
    "without confidence": ({"people": [{"pose_keypoints_2d": flat(POINTS)}], **CANVAS}, 1),
    "triples": ({"people": [{"pose_keypoints_2d": BODY.tolist()}], **CANVAS}, 1),
    "pairs": ({"people": [{"pose_keypoints_2d": POINTS.tolist()}], **CANVAS}, 1),
    "no more than a person": ({"pose_keypoints_2d": flat(BODY), **CANVAS}, 1),
    "openpose-editor": ({"keypoints": POINTS.tolist(), **SIDES}, 1),
    "openpose-editor, two": ({"keypoints": [*POINTS.tolist(), *(POINTS / 2).tolist()], **SIDES}, 2),
    "a list for each": ({"keypoints": [POINTS.tolist(), (POINTS / 2).tolist()], **SIDES}, 2),
    "numbers of all": ({"keypoints": flat([BODY, BODY * (0.5, 0.5, 1)]), **SIDES}, 2),
    "numbers for each": ({"keypoints": [flat(BODY), flat(BODY * (0.5, 0.5, 1))], **SIDES}, 2),
    "parts in pairs": ({"keypoints": parts(POINTS).tolist(), **SIDES}, 1),
    "a list of one frame": ([{"people": [{"pose_keypoints_2d": flat(BODY)}], **CANVAS}], 1),
    "a hand alone": ({"people": [{"hand_left_keypoints_2d": []}, {"pose_keypoints_2d": flat(BODY)}], **CANVAS}, 1),
    "nulls": (
        {"people": [{"pose_keypoints_2d": flat(BODY), "face_keypoints_2d": None, "hand_left_keypoints_2d": None}]}
        | CANVAS,
        1,
    ),
    "nobody": ({"people": [], **CANVAS}, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_all_editors_are_read(tmp_path, layout):
    content, people = LAYOUTS[layout]
    (tmp_path / "pose.json").write_text(json.dumps(content))
    expected = draw_pose(np.stack([BODY, BODY * (0.5, 0.5, 1)])[:people], (512, 512))
    assert np.array_equal(detect_file("pose", tmp_path / "pose.json"), expected) and bool(people) == expected.any()


def test_of_several_frames_the_first_is_taken_and_that_is_said(tmp_path):
    frames = [{"people": [{"pose_keypoints_2d": flat(BODY * (s, s, 1))}], **CANVAS} for s in (1, 0.5)]
    (tmp_path / "pose.json").write_text(json.dumps(frames))
    with pytest.warns(UserWarning, match="has 2 frames: taking the first"):
        hint = detect_file("pose", tmp_path / "pose.json")
    assert np.array_equal(hint, draw_pose(BODY, (512, 512)))


def lower(body, share):
    """As after a crop: moved down, so that this share of the joints is below the frame."""
    return body + (0, 512 - np.quantile(body[:, 1], 1 - share), 0)


PLACES = {
    "two below the frame": lower(BODY, 0.1),
    "half below": lower(BODY, 0.45),
    "left of it": BODY * (-1, 1, 1) + (200, 0, 0),
    "larger than it": BODY * (1.9, 1.9, 1),
    "three far outside": np.where(np.isin(np.arange(18), (4, 7, 10))[:, None], BODY * (3, 9, 1), BODY),
    "in its corner": BODY * (0.02, 0.02, 1),
}


@pytest.mark.parametrize("body", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("missing", [None, [0, 0, 0], [-1, -1, 0], [0, 0, 1], [None, None, None]])
def test_parts_of_the_canvas_are_told_from_pixels_by_most_of_the_joints(tmp_path, body, missing):
    """Some of which lie outside, or are missing."""
    rows = parts(body).tolist()
    lacking = body.copy()
    if missing is not None:
        for joint in (0, 4, 9):
            rows[joint], lacking[joint, 2] = missing, 0
    hint = detect_file("pose", pose_file(tmp_path, [[value for row in rows for value in row]], **CANVAS))
    assert np.array_equal(hint, draw_pose(lacking, (512, 512)))
    rows = [[*row[:2], c] if c else missing for row, c in zip(body.tolist(), lacking[:, 2].tolist(), strict=True)]
    in_pixels = [value for row in rows for value in row]
    assert np.array_equal(detect_file("pose", pose_file(tmp_path, [in_pixels], **CANVAS)), hint)


@pytest.mark.parametrize("hands_in_parts", [False, True])
@pytest.mark.parametrize("points", [70, 68])
def test_hands_and_faces_are_read_beside_a_body(tmp_path, opencv, hands_in_parts, points):
    """Hands in pixels beside a body in parts of the canvas, as some editors write them."""
    hands, face = opencv["pose/hands"], opencv["pose/face"][:points]
    written = parts(hands) if hands_in_parts else hands
    whole = {
        "pose_keypoints_2d": flat(parts(BODY)),
        "hand_left_keypoints_2d": written[0].tolist(),
        "hand_right_keypoints_2d": flat(np.column_stack([written[1], np.ones(21)])),
        "face_keypoints_2d": flat(parts(np.column_stack([face, np.ones(points)]))),
    }
    path = tmp_path / "pose.json"
    for keys in (whole.keys(), [key for key in whole if key != "pose_keypoints_2d"]):
        path.write_text(json.dumps({"people": [{key: whole[key] for key in keys}], **CANVAS}))
        bodies = BODY if "pose_keypoints_2d" in keys else np.zeros((0, 18, 3))
        expected = draw_pose(bodies, (512, 512), hands, [face])
        assert np.abs(detect_file("pose", path).astype(int) - expected).max() <= 1


def test_coordinates_may_be_parts_of_the_canvas_and_frames_a_list(tmp_path):
    parts = person() / (512, 512, 1)
    path = pose_file(tmp_path, [parts.ravel().tolist()], **CANVAS)
    path.write_text(f"[{path.read_text()}]")
    assert np.array_equal(detect_file("pose", path), draw_pose(person(), (512, 512)))


def test_null_is_a_missing_keypoint(tmp_path):
    numbers, lacking = person().ravel().tolist(), person()
    numbers[9:12] = [None, None, None]
    lacking[3] = np.nan
    path = pose_file(tmp_path, [numbers], **CANVAS)
    assert np.array_equal(detect_file("pose", path), draw_pose(lacking, (512, 512)))


def test_a_keypoint_at_no_possible_place_is_missing(tmp_path):
    far, lacking = person(), person()
    far[3, :2], lacking[3, 2] = (1e300, -5), 0
    hint = detect_file("pose", pose_file(tmp_path, [far.ravel().tolist()], **CANVAS))
    assert np.array_equal(hint, draw_pose(lacking, (512, 512)))


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "not readable as a pose"),
        ("3", "not readable as a pose"),
        ("{}", "it has no 'people'"),
        ('{"people": [{}]}', "it has no 'pose_keypoints_2d'"),
        ('{"people": [{"pose_keypoints_2d": [1, 2, 3]}]}', "3 numbers where those of 18 keypoints or 25"),
        ('{"people": [{"hand_left_keypoints_2d": [1, 2, 3]}]}', "3 numbers where those of 21 keypoints"),
        ('{"people": [{"pose_keypoints_2d": [[1, 2], [1]]}]}', "its keypoints are not numbers"),
        ('{"people": [3]}', "a person is not a JSON object"),
        ('{"people": 3}', "of the wrong type"),
        ('{"keypoints": 3}', "of the wrong type"),
        ('{"keypoints": [1, 2, 3]}', "3 numbers where"),
        ("[]", "it is not a JSON object or list of such"),
        ("[3]", "it is not a JSON object or list of such"),
        ('{"people": [{"pose_keypoints_2d": ["a"]}]}', "not readable as a pose"),
        ("[{}]", "it has no 'people'"),
        ('{"people": [], "canvas_width": Infinity}', "not readable as a pose"),
    ],
)
def test_what_is_no_pose_is_refused_in_a_sentence(tmp_path, text, sentence):
    (tmp_path / "pose.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_pose(tmp_path / "pose.json")
    with pytest.raises(ValueError, match="does not exist"):
        read_pose(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="it is not text: the detector openpose finds poses in a photograph"):
        read_pose(tmp_path / "photo.jpg")


# ---------------------------------------------------------------------------------------------------- filters


def test_scribble_and_threshold_take_the_darkest_channel():
    strokes = np.array([[(126, 255, 255), (127, 200, 255), (128, 128, 255), (255, 255, 0)]], dtype=np.uint8)
    assert detect("scribble", strokes)[0, :, 1].tolist() == [255, 0, 0, 255]
    assert detect("threshold", strokes)[0, :, 1].tolist() == [0, 0, 255, 0]
    assert detect("scribble", strokes, threshold=128)[0, :, 0].tolist() == [255, 255, 0, 255]
    assert detect("threshold", strokes, threshold=128)[0, :, 0].tolist() == [0, 0, 0, 0]


def test_invert_is_the_negative():
    image = noise(5, 7)
    assert np.array_equal(detect("invert", image).astype(int) + image, np.full((5, 7, 3), 255))


def test_blur_is_gaussian():
    image, sigma = photograph("coffee"), 4.0
    taps = np.exp(-0.5 * (np.arange(-20, 21) / sigma) ** 2)
    kernel = taps / taps.sum()
    padded = np.pad(image.astype(float), ((20, 20), (20, 20), (0, 0)), mode="edge")
    rows = sum(w * padded[i : i + image.shape[0]] for i, w in enumerate(kernel))
    exact = sum(w * rows[:, i : i + image.shape[1]] for i, w in enumerate(kernel))
    assert np.abs(detect("blur", image, sigma=sigma) - exact).mean() < 0.7
    assert np.abs(detect("blur", image, sigma=2.0) - exact).mean() > 3
    assert np.array_equal(detect("blur", image, sigma=0.0), image)


def test_tile_is_the_published_one_to_the_bit(opencv):
    assert np.array_equal(detect("tile", photograph("cat")[:64, :80]), opencv["tile/cat"])


def test_a_step_up_the_pyramid_is_opencvs_to_the_bit(opencv):
    for name in ("noise 1x1", "noise 3x5", "noise 33x47"):
        assert np.array_equal(pyramid_up(opencv[f"picture/{name}"]), opencv[f"pyramid_up/{name}"])


def test_tile_keeps_size_and_place_of_any_image():
    ramp = np.arange(100, 233, dtype=np.uint8)[None, :, None].repeat(61, axis=0).repeat(3, axis=2)  # 61x133
    tiled = detect("tile", ramp).astype(int)
    assert tiled.shape == ramp.shape
    assert np.abs(tiled - 3.5 - ramp)[:, 16:-16].max() <= 0.5  # a straight line stays one, but at its ends
    assert detect("tile", noise(3, 2)).shape == (3, 2, 3)


def test_shuffle_moves_colours_and_invents_none():
    image = photograph()
    shuffled = detect("shuffle", image)
    assert shuffled.shape == image.shape and np.abs(shuffled.astype(int) - image).mean() > 20
    assert np.all(shuffled.max(axis=(0, 1)) <= image.max(axis=(0, 1)))
    assert np.all(shuffled.min(axis=(0, 1)) >= image.min(axis=(0, 1)))
    flat = np.full((40, 30, 3), (10, 20, 30), dtype=np.uint8)
    assert np.array_equal(detect("shuffle", flat), flat)


def test_shuffle_repeats_with_its_seed_and_differs_between_images():
    """The warp is seen in an image of its own coordinates."""
    image = photograph()
    assert np.array_equal(detect("shuffle", image, seed=1), detect("shuffle", image, seed=1))
    assert not np.array_equal(detect("shuffle", image, seed=1), detect("shuffle", image, seed=2))
    columns, rows = np.meshgrid(np.arange(160, dtype=np.uint8), np.arange(160, dtype=np.uint8))
    places = np.stack([columns, rows, rows], axis=2)
    others = np.stack([columns, rows, columns], axis=2)
    assert not np.array_equal(detect("shuffle", places)[..., :2], detect("shuffle", others)[..., :2])


def test_shuffles_noise_is_smooth_and_reaches_everywhere():
    for cell in (16, 64):
        field = smooth_noise(np.random.default_rng(0), 100, 140, cell)
        assert field.shape == (100, 140) and field.min() == 0 and field.max() == 1
        assert np.abs(np.diff(field, axis=1)).max() < 3 / cell  # at most three times from 0 to 1 in a cell
        turns = np.diff(np.sign(np.diff(field[50]))) != 0
        assert (140 / cell) / 4 < turns.sum() + 1 < 140 / cell + 2  # about one hill or valley for each cell


def test_pixels_are_fetched_from_between_pixels():
    image = noise(6, 8)
    columns, rows = np.meshgrid(np.arange(8.0), np.arange(6.0))
    assert np.array_equal(fetched(image, columns, rows), image)
    assert np.array_equal(fetched(image, columns[:, ::-1], rows), image[:, ::-1])
    between = fetched(image, columns[:, :-1] + 0.25, rows[:, :-1])
    exact = 0.75 * image[:, :-1] + 0.25 * image[:, 1:].astype(float)
    assert np.abs(between - exact).max() <= 0.5


def test_inpaint_has_minus_one_in_its_hole_alone():
    image, mask = noise(4, 6), np.zeros((4, 6), dtype=np.uint8)
    mask[1, 2:5] = (127, 128, 255)
    hint = inpaint(image, mask)
    assert hint.dtype == np.float32 and np.array_equal(hint[1, 3:5], np.full((2, 3), -1))
    hint[1, 3:5] = image[1, 3:5] / np.float32(255)
    assert np.array_equal(hint, image / np.float32(255))
    assert np.array_equal(inpaint(image, mask > 127), inpaint(image, mask))
    with pytest.raises(ValueError, match="resize the mask"):
        inpaint(image, mask[:, 1:])


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (2, 3)])
def test_a_random_hole_depends_on_the_image_alone_and_is_never_all_of_it(size):
    holes = []
    for seed in range(60):
        image = noise(*size, seed)
        hint = inpaint_at_random(image)
        hole = (hint == -1).all(axis=2)
        assert np.array_equal(hint, inpaint_at_random(image.copy())) and np.array_equal(hint, inpaint(image, hole))
        holes.append(hole)
    shares = np.array([hole.mean() for hole in holes])
    assert len({hole.tobytes() for hole in holes}) > (50 if size != (2, 3) else 3)
    if size != (2, 3):
        assert 0.05 < shares.min() < 0.2 and 0.5 < shares.max() < 0.7
        boxes = [hole.any(axis=1).sum() * hole.any(axis=0).sum() == hole.sum() for hole in holes]
        assert 15 < sum(boxes) < 45


# ---------------------------------------------------------------------------------------------------- by name


OF_PHOTOGRAPHS = ("canny", "scribble", "threshold", "gray", "invert", "blur", "tile", "shuffle")


def test_every_detector_is_known_here():
    assert DETECTORS.keys() == {*OF_PHOTOGRAPHS, "pose", "depth", "normal", "segmentation", *LEARNED}


@pytest.mark.parametrize("name", OF_PHOTOGRAPHS)
def test_a_photograph_becomes_a_hint_of_its_size(name, tmp_path):
    Image.fromarray(photograph("coffee")).save(tmp_path / "photo.png")
    hint = detect_file(name, tmp_path / "photo.png")
    assert hint.dtype == np.uint8 and hint.shape == (129, 193, 3) and hint.std() > 1
    assert np.array_equal(hint, detect(name, photograph("coffee")))


def test_hints_are_listed_without_torch():
    code = "import sys; from controlnet.hints import DETECTORS; sys.exit('torch' in sys.modules or not DETECTORS)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FIXTURES.parents[2]).returncode == 0


def test_options_are_read_as_their_defaults_are():
    assert options_of("canny") == {"low": 100.0, "high": 200.0, "colour": False} and options_of("invert") == {}
    assert parse_options("canny", ["low=50"]) == {"low": 50.0}
    assert parse_options("shuffle", ["seed=3", "cell=64"]) == {"seed": 3, "cell": 64}
    assert parse_options("depth", ["distance=true"]) == {"distance": True}
    for name, text, sentence in (
        ("canny", "hi=3", 'canny has no option "hi=3", expected low=100.0, high=200.0, colour=False'),
        ("canny", "low", "canny has no option"),
        ("gray", "low=3", "expected none"),
        ("canny", "low=much", "expected a number"),
        ("canny", "low=inf", "expected a number"),
        ("shuffle", "seed=1.5", "expected a whole number"),
        ("depth", "distance=1", "expected true or false"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_options(name, [text])


@pytest.mark.parametrize(
    "text, name, options",
    [
        ("Canny", "canny", {}),
        ("CANNY:low=50", "canny", {"low": 50.0}),
        ("seg", "segmentation", {}),
        ("SoftEdge_HED", "hed", {}),
        ("softedge", "hed", {}),
        ("dwpose", "openpose", {"hands": True, "face": True}),
        ("openpose_full", "openpose", {"hands": True, "face": True}),
        ("openpose_full:face=false", "openpose", {"hands": True, "face": False}),
        ("openpose_hand", "openpose", {"hands": True}),
        ("depth_midas", "midas", {}),
        ("lineart_coarse", "lineart", {"coarse": True}),
        ("tile_resample", "tile", {}),
    ],
)
def test_detectors_are_also_known_by_what_others_call_them(text, name, options):
    assert parse_detector(text) == (name, options)


def test_other_names_mean_detectors_and_hide_none():
    assert all(alias == alias.lower() and find_detector(parse_detector(alias)[0]) for alias in ALIASES)
    assert not ALIASES.keys() & DETECTORS.keys()


def test_what_a_detector_cannot_work_with_is_refused_in_a_sentence():
    image = noise(8, 8)
    for call, sentence in (
        (lambda: detect("cany", image), "there is no detector"),
        (lambda: detect("canny", image, hi=3), 'has no option "hi"'),
        (lambda: detect("canny", image[..., 0]), "uint8 \\(H, W, 3\\), found uint8 \\(8, 8\\)"),
        (lambda: detect("canny", image / 255), "found float64"),
        (lambda: detect("canny", "cat.png"), "found str"),
        (lambda: detect("tile", image, factor=3), "factor is 3"),
        (lambda: detect("blur", image, sigma=-1.0), "sigma is -1"),
        (lambda: detect("shuffle", image, cell=0), "cell is 0"),
        (lambda: detect("shuffle", image, seed=-1), "seed -1"),
        (lambda: detect_file("canny", "no such file"), "does not exist"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_a_photograph_is_fitted_before_it_is_looked_at_and_a_pose_after(tmp_path):
    def half(image):
        return image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)

    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    small = np.asarray(half(Image.fromarray(photograph())))
    assert np.array_equal(detect_file("canny", tmp_path / "photo.png", half), detect("canny", small))
    path = pose_file(tmp_path, [person().ravel().tolist()], **CANVAS)
    drawn = half(Image.fromarray(draw_pose(person(), (512, 512))))
    assert np.array_equal(detect_file("pose", path, half), np.asarray(drawn))


# ---------------------------------------------------------------------------------------------------- learned


@pytest.mark.parametrize("name", LEARNED)
def test_without_its_package_a_learned_detector_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    segmenter.cache_clear()
    with pytest.raises(NotInstalledError, match="pip install controlnet_aux"):
        detect(name, noise(64, 64))


class Network:
    """As controlnet_aux's detectors: it rounds sizes to multiples of 64 and gives back an image."""

    loads = 0

    @classmethod
    def from_pretrained(cls, repository, **where):
        cls.loads += 1
        return cls()

    def to(self, device):
        self.device = device
        return self

    def __call__(self, image, detect_resolution, image_resolution, output_type, **options):
        assert output_type == "pil" and detect_resolution == image_resolution == min(image.size)
        self.options = options
        return Image.new("L", (192, 128), 200)


def test_a_learned_detector_is_loaded_once_and_its_hint_has_the_images_size(monkeypatch):
    names = ("HEDdetector", "MLSDdetector", "MidasDetector", "OpenposeDetector", "LineartDetector", "SamDetector")
    classes = {name: type(name, (Network,), {}) for name in names}
    monkeypatch.setitem(sys.modules, "controlnet_aux", SimpleNamespace(**classes))
    segmenter.cache_clear()
    for name, network in zip(LEARNED, classes.values(), strict=True):
        for _ in range(2):
            hint = detect(name, photograph("coffee"))
            assert hint.shape == (129, 193, 3) and hint.dtype == np.uint8 and (hint == 200).all()
        assert network.loads == 1
    with pytest.raises(ValueError, match="nowhere"):
        detect("hed", photograph("coffee"), device="nowhere")
    detect("openpose", photograph("coffee"), hands=True)
    assert annotator(classes["OpenposeDetector"], "auto").options == {"include_hand": True, "include_face": False}


class Hints(Dataset):
    """The device that a worker's detector computes on, for each name."""

    def __init__(self, devices):
        self.devices = devices

    def __len__(self):
        return len(self.devices)

    def __getitem__(self, i):
        return str(annotator(Network, self.devices[i]).device)


def test_detectors_stay_on_the_cpu_in_processes_that_read_data(monkeypatch):
    """Where they were forked from, the GPU cannot be used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    devices = ["auto", "cuda"]
    assert [str(annotator(Network, device).device) for device in devices] == ["cuda", "cuda"]
    assert list(DataLoader(Hints(devices), batch_size=None, num_workers=1)) == ["cpu", "cpu"]
    monkeypatch.setattr("controlnet.hints.learned.in_worker", lambda: True)
    with pytest.raises(ValueError, match="--workers 0"):
        detect("sam", noise(64, 64))


@pytest.mark.parametrize("kind", [OSError, ModuleNotFoundError])
def test_weights_and_packages_that_cannot_be_had_are_a_sentence(kind, monkeypatch):
    class Offline(Network):
        @classmethod
        def from_pretrained(cls, repository, **where):
            raise kind("no connection\nand much more")

    monkeypatch.setitem(sys.modules, "controlnet_aux", SimpleNamespace(HEDdetector=Offline))
    with pytest.raises(NotInstalledError, match="could not load the detector: no connection$"):
        detect("hed", noise(64, 64))
