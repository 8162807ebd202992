"""What the page makes pictures with, without a page."""

import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from controlnet.common.images import save_png
from controlnet.inference import run
from controlnet.inference.png_text import png_texts, read_texts
from tools.page.studio import Studio, Told

CIRCLE = Path(__file__).parents[3] / "assets" / "circle.png"
PROMPT = "red circle with blue background"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def told(studio):
    """All that is told of one picture."""
    hint = studio.keep(Image.open(CIRCLE).convert("RGB"))
    return list(studio.make(dict(prompt=PROMPT, steps=4, control_scale=[0.9], hint=[hint])))


def pictures(told):
    return [one.picture for one in told if one.picture]


def test_the_same_image_has_the_same_file_and_no_other(studio):
    images = [Image.new(*of) for of in (("L", (2, 6)), ("L", (6, 2)), ("L", (3, 4)), ("RGB", (2, 2)))]
    assert len({studio.keep(image) for image in [*images, *images]}) == 4
    assert [Image.open(studio.keep(image)).size for image in images] == [image.size for image in images]


def test_each_step_is_told_with_a_look_now_and_then(told):
    steps = [one for one in told if one.steps]
    assert [(one.step, one.steps) for one in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [one.step for one in steps if one.preview] == [3]
    assert [one.note for one in told if one.note][0].endswith('of the kind "circles": taking ControlNet tiny-fill50k')
    assert len(pictures(told)) == 1 and pictures(told)[0].name == "0001.png"


def test_a_picture_is_made_again_to_the_bit_with_the_base_in_memory(studio, told, monkeypatch):
    monkeypatch.setattr(run, "load_base", lambda job: pytest.fail("loaded again"))
    path = pictures(told)[0]
    again = pictures(studio.make({"again": str(path)}))[0]
    assert again != path and np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(path)))


def test_who_leaves_stops_it_at_the_next_step(studio, told):
    before = sorted(studio.folder.glob("*.png"))
    making = studio.make(dict(steps=50))
    while not next(making).steps:
        pass
    making.close()
    assert not any(one.steps for one in studio.make(dict(steps=0)))  # an error, once the other has ended
    assert sorted(studio.folder.glob("*.png")) == before


def test_a_visitor_cancels_what_is_made_for_him_alone(studio, told):
    before = sorted(studio.folder.glob("*.png"))
    making, waiting = studio.make(dict(steps=20), "one"), studio.make(dict(steps=20), "two")
    while not (now := next(making)).steps:
        pass
    waited = Thread(target=lambda: stopped.extend(waiting))
    stopped = []
    waited.start()
    while len(studio.making) < 2:
        pass
    studio.cancel("two")  # whose turn has not come
    waited.join()
    assert stopped == [Told(note="cancelled")] and now.step == 1 and next(making).step == 2
    studio.cancel("one")
    assert list(making)[-1] == Told(note="cancelled") and not studio.making
    assert sorted(studio.folder.glob("*.png")) == before


def test_what_is_cancelled_while_it_is_decoded_is_not_saved(studio, told, monkeypatch):
    def make_images(jobs, *_):
        studio.cancel("one")
        yield jobs[0], 0, Image.new("RGB", (8, 8))

    before = sorted(studio.folder.glob("*.png"))
    monkeypatch.setattr(run, "make_images", make_images)
    assert list(studio.make({}, "one"))[-1] == Told(note="cancelled")
    list(studio.make(dict(steps=0)))  # an error, once the other has ended
    assert sorted(studio.folder.glob("*.png")) == before


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(hint=["no-such.png"]), "no-such.png"),
        (dict(steps="many"), "the form has 'many' for \"steps\""),
        (dict(size="abc"), 'it is "abc", expected pixels'),
        (dict(prompt="<lora:../../secret:1>"), 'no LoRA "../../secret"'),
    ],
)
def test_what_goes_wrong_is_a_sentence(studio, given, sentence):
    (one,) = studio.make(given)
    assert sentence in one.note and "\n" not in one.note


def test_others_words_are_not_the_visitors(studio, monkeypatch, capsys):
    def prepare(*_):
        other = Thread(target=lambda: print("of the server", file=sys.stderr))
        other.start()
        other.join()
        print("of the picture", file=sys.stderr)
        raise ValueError("enough")

    monkeypatch.setattr(run, "prepare", prepare)
    assert list(studio.make({})) == [Told(note="of the picture"), Told(note="enough")]
    assert "of the server" in capsys.readouterr().err


def test_a_picture_fills_the_form_with_its_hint(studio, told):
    options, left_out = studio.options_of(str(pictures(told)[0]))
    assert (options.prompt, options.steps, options.control, options.control_scale) == (
        PROMPT,
        4,
        ["tiny-fill50k"],
        [0.9],
    )
    assert not left_out and np.array_equal(np.asarray(Image.open(options.hint[0])), np.asarray(Image.open(CIRCLE)))
    assert not list(studio.folder.glob(".*"))


def test_a_picture_opens_no_files_outside_the_pages_folders(studio, told, tmp_path):
    settings, _ = read_texts(pictures(told)[0])
    secret = tmp_path / "secret.png"
    save_png(Image.new("RGB", (8, 8)), secret, {})
    foreign = tmp_path / "foreign.png"
    save_png(Image.new("RGB", (8, 8)), foreign, png_texts({**settings, "hint": [str(secret)]}))
    options, left_out = studio.options_of(str(foreign))
    assert options.prompt == PROMPT and options.hint == [] and left_out.startswith(f'"foreign.png" names "{secret}"')
    with pytest.raises(ValueError, match=r'^"secret.png" does not say how it was made'):
        studio.options_of(str(secret))
