"""tools.make_hints: a folder of hints, made once, whatever is in the folder of images."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlnet.hints import DETECTORS, detect
from controlnet.hints.detectors import Detector
from controlnet.training.pairs import Wanted, recognise
from controlnet.training.sources import FolderSource
from controlnet.training.transform import Transform
from tools import make_hints


@pytest.fixture
def images(tmp_path):
    """Two images, one of them a folder down, and a file that is none."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (90, 70)), ("more/b.PNG", (64, 100))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image, and no name of one")
    return folder


def run(*words):
    return make_hints.main([str(word) for word in words])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_each_image_has_a_hint_of_its_name(images, tmp_path, capsys):
    out = tmp_path / "hints"
    assert run("canny", images, out) == 0
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == ["a.png", "more/b.png"]
    assert np.array_equal(pixels(out / "a.png"), detect("canny", pixels(images / "a.png")))
    assert np.array_equal(pixels(out / "more/b.png"), detect("canny", pixels(images / "more/b.PNG")))
    assert "2 hints made" in capsys.readouterr().out


def test_options_and_size_reach_the_detector(images, tmp_path):
    out = tmp_path / "hints"
    assert run("canny", images, out, "--option", "low=400", "--option", "high=700") == 0
    assert np.array_equal(pixels(out / "a.png"), detect("canny", pixels(images / "a.png"), low=400, high=700))
    assert run("invert", images, out, "--replace", "--size", 128) == 0
    assert pixels(out / "a.png").shape == (165, 128, 3)  # 90x70 at 128: 164.6 x 128
    assert pixels(out / "more/b.png").shape == (128, 200, 3)


def test_hints_of_any_size_are_what_training_accepts_and_sees(tmp_path):
    """Photographs of 4:3 and 3:2, whose sides are not multiples of anything; training does not resize such hints."""
    rng = np.random.default_rng(0)
    for name, size in (("a", (120, 160)), ("b", (150, 100)), ("c", (67, 101))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(name)
    assert run("canny", tmp_path / "images", tmp_path / "hints", "--size", "64") == 0
    source = FolderSource("x", recognise(tmp_path, Wanted()).entries, Transform((64, 64)))
    for i, entry in enumerate(source.entries):
        shape, hint = pixels(entry.hint).shape, source.sample(i).hint
        top, left = ((side - 64) // 2 for side in shape[:2])
        assert min(shape[:2]) == 64 and np.array_equal(hint, pixels(entry.hint)[top : top + 64, left : left + 64])


def test_what_is_there_is_left_alone_until_it_is_replaced(images, tmp_path, capsys):
    out = tmp_path / "hints"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    assert run("gray", images, out) == 0
    assert (out / "a.png").read_bytes() == b"mine"
    assert "1 hints made" in (said := capsys.readouterr().out) and "1 were there already" in said
    assert run("gray", images, out, "--replace") == 0
    assert np.array_equal(pixels(out / "a.png"), detect("gray", pixels(images / "a.png")))


def test_bad_files_are_named_at_the_end_and_the_others_made(images, tmp_path, capsys):
    (images / "0.png").write_bytes(b"broken")
    (images / "a.jpg").write_bytes((images / "a.png").read_bytes())
    Image.new("RGB", (17, 1)).save(images / "strip.png")
    out = tmp_path / "hints"
    assert run("gray", images, out, "--size", "64") == 1
    said = capsys.readouterr()
    assert sorted(path.name for path in out.rglob("*.*")) == ["a.png", "b.png"]
    lines = [line for line in said.err.splitlines() if line.startswith("no hint for")]
    assert "strip.png" in lines.pop(1) and "0.png" in lines[0] and "not readable as an image" in lines[0]
    assert "a.png" in lines[1] and "a.jpg" in lines[1] and "Traceback" not in said.err


def test_a_detector_that_fails_on_one_image_goes_on_with_the_next(images, tmp_path, monkeypatch, capsys):
    def fail_on_the_first(image):
        if image.shape == (90, 70, 3):
            raise MemoryError
        return image

    monkeypatch.setitem(DETECTORS, "gray", Detector(fail_on_the_first, ""))
    assert run("gray", images, tmp_path / "hints") == 1
    said = capsys.readouterr()
    assert "1 hints made" in said.out and "a.png: MemoryError" in said.err


def test_a_run_that_stops_leaves_no_half_written_hint(images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "hints"
    saved = Image.Image.save

    def stop(image, path, **settings):
        if "b.png" in str(path):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        saved(image, path, **settings)

    monkeypatch.setattr(Image.Image, "save", stop)
    assert run("gray", images, out) == 130
    assert capsys.readouterr().err.endswith("make_hints: stopped, nothing half-written is left\n")
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["a.png"]
    monkeypatch.undo()
    assert run("gray", images, out) == 0
    assert "1 hints made" in capsys.readouterr().out and (out / "more/b.png").exists()


@pytest.mark.parametrize("name", ["a.avif", "a.tga", "a.ppm", "a.PGM", "a.jp2", "a.jfif", "a.pcx", "a.dib"])
def test_images_of_all_formats_are_taken(tmp_path, name):
    (tmp_path / "in").mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)).resize((64, 64))
    image.convert("L" if name.endswith("PGM") else "RGB").save(tmp_path / "in" / name)
    assert run("canny", tmp_path / "in", tmp_path / "out") == 0
    stored = pixels(tmp_path / "in" / name)
    assert np.array_equal(pixels(tmp_path / "out" / "a.png"), detect("canny", stored)) and stored.std() > 1


def test_other_files_are_counted_and_those_of_macos_are_not_looked_at(images, tmp_path, capsys):
    (images / "._a.png").write_bytes(b"resource fork")
    (images / "a.psd").write_bytes(b"layers")
    assert run("gray", images, tmp_path / "hints") == 0
    assert "2 files of other kinds are left out (.psd, .txt)" in capsys.readouterr().err


def test_a_single_file_has_a_hint_too(images, tmp_path, capsys):
    (tmp_path / "photo").write_bytes((images / "a.png").read_bytes())
    for source, name in ((images / "a.png", "a.png"), (tmp_path / "photo", "photo.png")):
        assert run("Canny", source, tmp_path / "hints", "--option", "low=50") == 0
        assert np.array_equal(pixels(tmp_path / "hints" / name), detect("canny", pixels(images / "a.png"), low=50))


@pytest.mark.parametrize("name, line", [("invert", 0), ("threshold", 255), ("gray", None)])
def test_white_strokes_on_a_transparent_ground_stay_strokes(tmp_path, name, line):
    """Of a drawing; a photograph is laid on white, as it is when it is trained on."""
    strokes = np.full((64, 64, 4), 255, np.uint8)
    strokes[..., 3] = 0
    strokes[30:33, :, 3] = 255
    Image.fromarray(strokes).save(tmp_path / "in.png")
    assert run(name, tmp_path / "in.png", tmp_path / "out") == 0
    hint = pixels(tmp_path / "out/in.png")
    assert np.all(hint == 255) if line is None else np.all(hint[31] == line) and np.all(hint[0] == 255 - line)


def test_poses_and_maps_are_read_from_their_files(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    keypoints = np.random.default_rng(0).uniform(5, 60, (18, 3)).ravel().tolist()
    person = {"people": [{"pose_keypoints_2d": keypoints}], "canvas_width": 64, "canvas_height": 72}
    (folder / "pose.json").write_text(json.dumps(person))
    np.save(folder / "depth.npy", np.arange(64.0).reshape(8, 8))
    assert run("pose", folder, out) == 0 and pixels(out / "pose.png").shape == (72, 64, 3)
    assert run("depth", folder, out) == 0 and pixels(out / "depth.png")[-1, -1].tolist() == [255, 255, 255]


def test_what_cannot_begin_is_one_sentence(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    (images / "notes.txt").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out = tmp_path / "hints"
    for words, sentence in (
        (("cany", images, out), "there is no detector"),
        (("canny", tmp_path / "nowhere", out), "expected a folder or a file"),
        (("canny", "https://host/a.png", out), 'IN is "https://host/a.png", expected'),
        (("canny", "-", out), 'IN is "-", expected'),
        (("canny", images / "a.png", images), "the hint would replace"),
        (("canny", tmp_path / "empty", out), "there is no file for canny"),
        (("pose", images, out), "expected .json"),
        (("canny", images, images / "hints"), "is in IN,"),
        (("canny", images, images), "is in IN,"),
        (("canny", images, tmp_path / "file"), "cannot be a folder (File exists)"),
        (("canny", images, out, "--option", "low=x"), "expected a number"),
        (("canny", images, out, "--size", "10"), "at least 64"),
        (("hed", images, out), "pip install controlnet_aux"),
    ):
        assert run(*words) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("make_hints: ") and sentence in said and said.count("\n") == 1, said
        assert not list(out.glob("*.png"))
    with pytest.raises(ValueError, match="no detector"):
        run("cany", images, out, "--debug")


def test_help_lists_the_detectors(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "low=100.0, high=200.0, colour=False" in capsys.readouterr().out


def test_the_pictures_of_a_run_get_no_hints(images, tmp_path, capsys):
    (images / "run/state").mkdir(parents=True)
    (images / "run/settings.json").touch()
    Image.new("RGB", (64, 64)).save(images / "run/example.png")
    assert run("canny", images, tmp_path / "hints") == 0
    assert "2 hints made" in capsys.readouterr().out
