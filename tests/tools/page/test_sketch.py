"""What the canvas and the editors of the page send, without a page."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from controlnet.inference.options import Options
from tools.page.editors import FROM_NOISE, FROM_PHOTO, PAINTED, background, begun_from, detected, hints_of, painted
from tools.page.sketch import PNG, SIDE, STANDING, hint_of, sent_back
from tools.page.studio import BY_HINT, Studio


def test_a_drawing_comes_as_it_was_drawn_and_goes_back(tmp_path):
    drawn = Image.new("RGB", (SIDE, SIDE))
    drawn.paste("white", (10, 20, 30, 40))
    drawn.save(tmp_path / "drawn.png")
    found = hint_of(sent_back(Options(hint=[str(tmp_path / "drawn.png")])))
    assert np.array_equal(np.asarray(found), np.asarray(drawn))
    assert hint_of(sent_back(Options(hint=["pose.png"])))  # an example of assets/
    assert sent_back(Options(hint=[str(tmp_path / "gone.png")])) is None is sent_back(Options())
    assert sent_back(Options(hint=[str(tmp_path / "drawn.png")], detect=["canny"])) is None


def test_a_pose_is_drawn_where_its_joints_are():
    joints = [*STANDING]
    joints[4] = [0.25, 0.75]  # the right wrist
    found = np.asarray(hint_of(json.dumps({"pose": joints})))
    assert found.shape == (SIDE, SIDE, 3) and found[int(0.75 * SIDE), int(0.25 * SIDE)].max() == 255


def test_an_empty_drawing_is_a_sentence():
    drawn = io.BytesIO()
    Image.new("RGBA", (SIDE, SIDE), "black").save(drawn, "PNG")
    with pytest.raises(ValueError, match="nothing is drawn yet"):
        hint_of(json.dumps({"drawing": PNG + base64.b64encode(drawn.getvalue()).decode()}))


@pytest.mark.parametrize(
    "sent",
    ["", "{}", "[1]", "null", '{"pose": [[1, 2]]}', '{"pose": "x"}', '{"drawing": 3}', '{"drawing": "/etc/hostname"}']
    + [json.dumps({"drawing": base64.b64encode(b"GIF89a").decode()})],
)
def test_anything_else_is_refused(sent):
    with pytest.raises(ValueError, match="the canvas sent no drawing and no pose"):
        hint_of(sent)


def test_hints_are_detected_at_the_size_of_the_picture_and_enlarged(tmp_path):
    photo = Image.new("RGB", (300, 300))
    photo.paste("white", (100, 100, 200, 200))
    photo.save(tmp_path / "photo.png")
    found = np.asarray(detected(str(tmp_path / "photo.png"), "canny:low=50", "tiny", ""))
    assert found.shape == (512, 512, 3) and found.any()
    assert np.array_equal(found, np.repeat(np.repeat(found[::4, ::4], 4, 0), 4, 1))
    assert detected(str(tmp_path / "photo.png"), "blur", "tiny", "256x64").size == (2048, 512)
    with pytest.raises(ValueError, match='"many", expected pixels'):
        detected(str(tmp_path / "photo.png"), "canny", "tiny", "many")


def held(colour="red", strokes=()):
    """As an editor holds it."""
    ground, layer = Image.new("RGBA", (64, 32), colour), Image.new("RGBA", (64, 32))
    for box in strokes:
        layer.paste("white", box)
    return {"background": ground, "layers": [layer], "composite": Image.alpha_composite(ground, layer)}


def test_what_is_painted_is_the_mask(tmp_path):
    studio = Studio(tmp_path)
    photo = held(strokes=[(8, 8, 16, 16)])
    assert begun_from(studio, photo, FROM_NOISE, 0.5, False) == {}
    given = begun_from(studio, photo, FROM_PHOTO, 0.5, False)
    assert given.keys() == {"init", "strength"} and Image.open(given["init"]).getpixel((9, 9)) == (255, 0, 0)
    given = begun_from(studio, photo, PAINTED, 0.5, True)
    mask = Image.open(given["mask"])
    assert (mask.mode, mask.size, mask.getbbox(), given["only_masked"]) == ("L", (64, 32), (8, 8, 16, 16), 32)
    assert painted(held()) is None and painted(None) is None
    with pytest.raises(ValueError, match="nothing is painted"):
        begun_from(studio, held(), PAINTED, 1, False)
    with pytest.raises(ValueError, match="^drop one$"):
        background({"background": None, "layers": [], "composite": None}, "drop one")


def test_controls_without_a_hint_are_left_out(tmp_path):
    studio = Studio(tmp_path)
    nothing = {"background": None, "layers": [], "composite": None}
    parts = [[held("black", [(0, 0, 4, 4)]), BY_HINT, 0.5, 0, 0.5, None], [nothing, "canny", 1, 0, 1, nothing]]
    parts.append([held("black"), "tiny-pose", 1, 0.25, 1, held(strokes=[(0, 0, 8, 8)])])
    given = hints_of(studio, parts)
    assert [Image.open(hint).getpixel((0, 0)) for hint in given["hint"]] == [(255,) * 3, (0,) * 3]
    assert given["control"] == [None, "tiny-pose"] and given["control_scale"] == [0.5, 1]
    assert (given["control_start"], given["control_end"]) == ([0, 0.25], [0.5, 1])
    assert given["control_mask"][0] is None and Image.open(given["control_mask"][1]).getbbox() == (0, 0, 8, 8)
    assert hints_of(studio, [parts[1]]) == {}
