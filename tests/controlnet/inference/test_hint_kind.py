"""Which small ControlNet a hint is for: drawn hints of each kind, and what is not for guessing."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from controlnet.common.image_files import ground_of_hint, read_image
from controlnet.common.images import resized
from controlnet.hints import DETECTORS, detect
from controlnet.hints.pose import draw_pose
from controlnet.inference import hint_kind
from controlnet.inference.hint_kind import LOOKS, READS, channels, doubt, fewer, kind_of, looks_like
from controlnet.worlds import WORLDS

ROOT = Path(__file__).parents[3]
PHOTOGRAPHS = ["assets/cat.jpg", "assets/coffee.jpg", *(f"tests/fixtures/hints/{n}.webp" for n in ("cat", "rocket"))]


@cache
def pixels_of(name):
    return np.asarray(read_image(ROOT / name, ground_of_hint))


def drawn(draw, size=256, ground="black"):
    image = Image.new("RGB", (size, size), ground)
    draw(ImageDraw.Draw(image))
    return np.asarray(image)


KINDS = {"fill50k": "circles", "people": "pose"} | {name: name for name in ("canny", "scribble", "seg", "depth")}


@pytest.mark.parametrize("name", [*KINDS, "scenes"])
@pytest.mark.parametrize("size, shown, count", [(64, 64, 6), (128, 128, 6), (512, 128, 1), (128, 512, 2)])
def test_hints_of_the_datasets_are_of_their_kinds_and_not_doubted_also_when_resized(name, size, shown, count):
    world, control = WORLDS[name](size, seed=1), "canny" if name == "scenes" else KINDS[name]
    for i in range(count):
        hint = np.asarray(resized(Image.fromarray(world[i].hint), (shown, shown)))
        assert name == "scenes" or kind_of(hint) == KINDS[name]
        assert doubt("a", f"tiny-{control}", hint) == ""


@pytest.mark.parametrize("name", ["canny", "circle", "depth", "pose", "scribble", "segmentation"])
def test_our_examples_are_of_their_kinds(name):
    kind = {"circle": "circles", "segmentation": "seg"}.get(name, name)
    assert kind_of(pixels_of(f"assets/{name}.png")) == kind


LINES = {
    "a line": lambda d: d.line((10, 20, 240, 200), "white", 2),
    "an ellipse": lambda d: d.ellipse((40, 80, 220, 170), outline="white", width=2),
    "a square": lambda d: d.rectangle((60, 60, 200, 200), outline="white", width=2),
    "two circles": lambda d: [d.ellipse((x, 90, x + 80, 170), outline="white", width=2) for x in (20, 140)],
    "half a circle": lambda d: d.arc((60, 60, 200, 200), 0, 180, "white", 2),
    "a circle with a line": lambda d: [d.ellipse((60, 60, 200, 200), outline="white"), d.line((0, 0, 255, 9), "white")],
}


@pytest.mark.parametrize("name", LINES)
def test_other_white_lines_are_edges(name):
    assert kind_of(drawn(LINES[name])) == "canny"


def test_detected_edges_are_edges():
    rng = np.random.default_rng(0)
    photograph = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((256, 256), Image.NEAREST)
    assert kind_of(detect("canny", np.asarray(photograph))) == "canny"


def test_limbs_in_the_pose_colours_are_a_pose():
    def limbs(d):
        for i, colour in enumerate([(153, 0, 0), (153, 51, 0), (0, 153, 51), (0, 102, 153), (102, 0, 153)]):
            d.line((128, 40, 40 * i + 40, 220), colour, 8)
        d.ellipse((120, 32, 136, 48), "red")

    for size in (64, 256, 600):
        assert kind_of(np.asarray(resized(Image.fromarray(drawn(limbs)), (size, size)))) == "pose"


@pytest.mark.parametrize("quality", [60, 75, 95])
def test_poses_are_poses_also_as_jpeg(quality):
    """Which takes half of their colours' resolution."""
    world, kinds = WORLDS["people"](128, 0), []
    for i in range(10):
        file = io.BytesIO()
        Image.fromarray(world[i].hint).save(file, "JPEG", quality=quality)
        kinds.append(kind_of(np.asarray(Image.open(file))))
    assert kinds == ["pose"] * 10


NOTHING = {
    "black": lambda d: None,
    "lines on white": lambda d: [d.rectangle((0, 0, 256, 256), "white"), d.line((10, 20, 240, 200), "black", 2)],
    "a filled disc": lambda d: d.ellipse((60, 60, 200, 200), "white"),
    "brown": lambda d: d.rectangle((60, 60, 160, 160), (150, 110, 80)),
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_look_like_photographs_and_are_not_for_guessing(name):
    assert looks_like(pixels_of(name)) == "a photograph"
    assert not any(LOOKS[READS[control][0]](pixels_of(name)) for control in ("canny", "openpose", "depth"))
    gray = np.asarray(Image.fromarray(pixels_of(name)).convert("L").convert("RGB"))
    assert kind_of(pixels_of(name)) is None and kind_of(gray) is None


@pytest.mark.parametrize("name", NOTHING)
def test_anything_else_is_not_for_guessing(name):
    assert kind_of(drawn(NOTHING[name])) is None


# -------------------------------------------------------------------------------------------------------------- doubts

READ_LINES = {"canny", "circles", "fill50k", "scribble", "lineart", "softedge", "hed", "mlsd"}
READ_BY = {
    **dict.fromkeys(("canny", "circle", "scribble"), READ_LINES),
    "depth": {"depth", "midas", "zoe"},
    "pose": {"pose", "openpose", "dwpose"},
    "segmentation": {"seg", "segmentation"},
}


@pytest.mark.parametrize("name", READ_BY)
def test_our_examples_are_what_their_controls_read_and_no_others(name):
    pixels = fewer(pixels_of(f"assets/{name}.png"), 128)
    for control in READS:
        said = doubt(name, f"control_v11p_sd15_{control}.pth", pixels)
        assert (said == "") if control in READ_BY[name] else f'"{name}" looks like ' in said, (control, said)


@pytest.mark.parametrize(
    "name, control, detector",
    [
        (PHOTOGRAPHS[0], "canny", "canny"),
        (PHOTOGRAPHS[1], "scribble", "hed"),
        (PHOTOGRAPHS[2], "softedge", "hed"),
        (PHOTOGRAPHS[3], "openpose", "openpose"),
        (PHOTOGRAPHS[0], "depth", "midas"),
        (PHOTOGRAPHS[1], "lineart_anime", "lineart"),
        (PHOTOGRAPHS[2], "mlsd", "mlsd"),
    ],
)
def test_a_photograph_gets_the_detector_that_is_missing(name, control, detector):
    said = doubt(name, f"weights/control_v11p_sd15_{control}.pth", pixels_of(name))
    assert f'"{name}" looks like a photograph' in said and said.endswith(f": add --detect {detector}")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("size, options", [((128, 192), {"low": 30.0, "high": 80.0}), ((384, 576), {})])
def test_edges_of_a_photograph_are_not_doubted_but_their_negative_and_their_edges(name, size, options):
    source = np.asarray(resized(Image.fromarray(pixels_of(name)), size))
    edges = detect("canny", source, **options)
    assert doubt(name, "canny", edges, "canny", source) == ""
    assert doubt("x", "canny", 255 - edges).endswith("reads light lines on black: add --detect invert")
    assert doubt("x", "canny", 255 - edges, "invert", edges).startswith("--detect invert makes of ")
    assert doubt("x", "canny", detect("invert", 255 - edges), "invert", 255 - edges) == ""
    assert "leave out --detect canny" in doubt("x", "canny", detect("canny", edges), "canny", edges)
    assert "looks like light lines on black" in doubt("x", "depth", edges)


def test_a_drawn_pose_has_no_pose_to_find():
    pose = pixels_of("assets/pose.png")
    assert "leave out --detect dwpose" in doubt("x", "openpose", pose, "dwpose", pose)


@pytest.mark.parametrize("colour", [0, 7, 255])
def test_an_empty_hint_is_said_whatever_the_control(colour):
    empty = np.full((64, 64, 3), colour, np.uint8)
    assert doubt("x.png", "mine", empty) == '"x.png" is of one colour'
    for detect_text, advice in (
        ("canny:low=500,high=600", ": lower its thresholds, as in canny:low=50,high=100"),
        ("openpose", ""),
    ):
        said = doubt("x.png", "mine", empty, detect_text, pixels_of("assets/cat.jpg"))
        assert said == f'--detect {detect_text} finds nothing in "x.png"{advice}'


def test_what_a_control_reads_is_in_its_name_or_its_folders():
    photograph = pixels_of("assets/coffee.jpg")
    for name in (
        "tiny-canny",
        "lllyasviel/sd-controlnet-canny",
        "canny/diffusion_pytorch_model.safetensors",
        "My_CANNY",
    ):
        assert doubt("x", name, photograph)
    for name in ("runs/control/control.safetensors", "control_v11f1e_sd15_tile", "purpose", "shuffle", "inpaint"):
        assert doubt("x", name, photograph) == ""


def test_normal_maps_are_told_from_photographs():
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    ball = np.stack([x, -y, np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))], axis=2) * (x**2 + y**2 < 1)[..., None]
    assert doubt("x", "normalbae", detect("normal", ball)) == ""
    assert doubt("x", "normalbae", detect("normal", np.dstack([x, y, np.ones_like(x)]))) == ""
    assert all(doubt("x", "normalbae", pixels_of(name)) for name in PHOTOGRAPHS)


def test_a_pose_with_a_face_and_hands_is_a_pose():
    rng = np.random.default_rng(0)
    face = rng.uniform(100, 180, (70, 2))
    hint = draw_pose(np.zeros((0, 18, 3)), (512, 512), [rng.uniform(250, 350, (21, 2))], [face])
    assert doubt("x", "openpose", hint) == ""


def test_every_detector_that_is_recommended_exists():
    assert {detector for _, detector in READS.values()} <= {None, *DETECTORS}


def test_of_large_hints_some_pixels_are_looked_at(monkeypatch):
    """Four million of them take seconds."""
    seen = []
    monkeypatch.setattr(hint_kind, "channels", lambda pixels: seen.append(pixels.shape[0]) or channels(pixels))
    circle = drawn(lambda d: d.ellipse((60, 60, 200, 200), outline="white"))
    large = np.asarray(Image.fromarray(circle).resize((2100, 2100)))
    assert kind_of(large) == "circles" and seen == [1050]
    assert doubt("x", "canny", large) == "" and looks_like(large) == "light lines on black"
    assert max(seen[1:]) == 420
