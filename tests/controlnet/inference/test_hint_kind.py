"""Which small ControlNet a hint is for: drawn hints of each kind, and what is not for guessing."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from controlnet.common.images import resized
from controlnet.hints import detect
from controlnet.inference.hint_kind import kind_of
from controlnet.worlds import Fill50k


def drawn(draw, size=256, ground="black"):
    image = Image.new("RGB", (size, size), ground)
    draw(ImageDraw.Draw(image))
    return np.asarray(image)


@pytest.mark.parametrize("size, shown", [(128, 128), (512, 512), (512, 128), (128, 512)])
def test_circles_of_the_training_world_are_circles_also_when_resized(size, shown):
    world = Fill50k(size, seed=1)
    kinds = [kind_of(np.asarray(resized(Image.fromarray(world[i].hint), (shown, shown)))) for i in range(20)]
    assert kinds == ["circles"] * 20


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


NOTHING = {
    "black": lambda d: None,
    "lines on white": lambda d: [d.rectangle((0, 0, 256, 256), "white"), d.line((10, 20, 240, 200), "black", 2)],
    "a filled disc": lambda d: d.ellipse((60, 60, 200, 200), "white"),
    "a gray ramp": lambda d: [d.line((i, 0, i, 255), (i, i, i)) for i in range(256)],
    "brown": lambda d: d.rectangle((60, 60, 160, 160), (150, 110, 80)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_anything_else_is_not_for_guessing(name):
    assert kind_of(drawn(NOTHING[name])) is None
