"""tools.make_data and tools.check_data, and that training reads what the one writes as the other says."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from controlnet.training.pairs import Wanted, recognise
from controlnet.training.sources import FolderSource
from controlnet.training.transform import Transform
from controlnet.worlds import WORLDS
from tools import check_data, make_data


@pytest.mark.parametrize("name", ["fill50k", "people"])
def test_a_world_on_disk_is_the_world(tmp_path, name):
    out = tmp_path / "out"
    assert make_data.main([name, "--count", "3", "--size", "64", "--seed", "5", "--out", str(out)]) == 0
    first = json.loads((out / "prompt.json").read_text().splitlines()[0])
    assert first.keys() == {"source", "target", "prompt"}
    source, world = FolderSource("x", recognise(out, Wanted()).entries, Transform((64, 64))), WORLDS[name](64, 5)
    assert len(source) == 3
    for i in range(3):
        sample = source.sample(i)
        assert np.array_equal(sample.image, world[i].image) and np.array_equal(sample.hint, world[i].hint)
        assert sample.caption == world[i].caption
    assert check_data.main([str(out)]) == 0


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert make_data.main(["fill50k", "--count", "1", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert make_data.main(["fill50k", "--count", "1", "--out", str(tmp_path / "mine.txt")]) == 2
    assert "cannot be a folder" in capsys.readouterr().err
    assert make_data.main(["nowhere", "--out", str(tmp_path / "new")]) == 2
    assert "people" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_every_kind_of_bad_sample_is_found(tmp_path, capsys):
    assert make_data.main(["fill50k", "--count", "6", "--size", "64", "--out", str(tmp_path / "pairs")]) == 0
    folder = tmp_path / "pairs"
    (folder / "target/0.png").write_bytes(b"no image")
    (folder / "source/1.png").unlink()
    Image.new("RGB", (64, 32)).save(folder / "source/2.png")
    lines = (folder / "prompt.json").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "prompt": ""})
    lines[4] = lines[4][:20]
    (folder / "prompt.json").write_text("\n".join(lines))
    capsys.readouterr()
    assert check_data.main([str(folder)]) == 1
    *problems, summary = capsys.readouterr().out.splitlines()
    assert summary == "1 pairs are good, 5 are bad"
    for words in ("prompt.json:4", "prompt.json:5", "target/0.png", "source/1.png", "source/2.png"):
        assert sum(words in problem for problem in problems[:5]) == 1, words


def pairs(folder, count=6):
    """Photographs of noise with captions beside them, and white lines on black as hints."""
    rng = np.random.default_rng(0)
    for name in ("images", "hints"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
        (folder / f"images/{i}.txt").write_text(f"number {i}")
        draw_hint(folder / f"hints/{i}.png", 0, 255)
    return folder


def draw_hint(path, ground, line):
    pixels = np.full((64, 64, 3), ground, np.uint8)
    pixels[20:22, 5:60] = pixels[5:60, 30:32] = line
    Image.fromarray(pixels).save(path)


def copy_of_validation(folder):
    """Of 6 pairs one is held out: whichever it is, its picture is all others, too."""
    for i in range(1, 6):
        shutil.copy(folder / "images/0.png", folder / f"images/{i}.png")


def nested(folder):
    (folder / "images/more").mkdir()
    shutil.copy(folder / "images/2.png", folder / "images/more/7.png")


ODDITIES = {  # what is done to the pairs -> what is found, and the file that is named
    "black": (lambda f: draw_hint(f / "hints/3.png", 0, 0), "black hints (1): nothing was found", "hints/3.png"),
    "white": (lambda f: draw_hint(f / "hints/3.png", 255, 255), "hints of one colour (1): nothing can", "hints/3.png"),
    "inverted": (
        lambda f: draw_hint(f / "hints/3.png", 255, 0),
        "dark lines on white (1): .*make_hints inv",
        "hints/3.png",
    ),
    "labels": (
        lambda f: draw_hint(f / "hints/3.png", 0, 2),
        "label maps (1): .*make_hints segmentation",
        "hints/3.png",
    ),
    "again": (
        lambda f: shutil.copy(f / "images/1.png", f / "images/2.png"),
        "than once (1): remove all but",
        "1.png and ",
    ),
    "validation": (copy_of_validation, "also trained on (1): the validation loss", "images/"),
    "stems": (
        lambda f: Image.new("RGB", (64, 64)).save(f / "images/4.jpg"),
        "share a hint (1): .*rename",
        "4.jpg and ",
    ),
    "long": (lambda f: (f / "images/5.txt").write_text("red " * 90), "more than 77 tokens.*(1): ", "images/5.png (90)"),
    "Latin-1": (
        lambda f: (f / "images/5.txt").write_text("cafÃ©"),
        "another encoding than UTF-8 (1): ",
        "images/5.png",
    ),
    "leftover": (
        lambda f: (f / "images/5.png").unlink(),
        "in no pair (1): they are left out",
        "hints/5.png",
    ),
    "nested": (nested, "in no pair (1): they are left out", "images/more/7.png"),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_what_is_odd_is_named_with_what_to_do(tmp_path, capsys, name):
    change, words, file = ODDITIES[name]
    change(pairs(tmp_path))
    assert check_data.main([str(tmp_path), "--size", "64"]) == 1
    head, *rest = capsys.readouterr().out.splitlines()[-20:]
    out = "\n".join([head, *rest])
    pattern = words.replace("(", r"\(").replace(")", r"\)")
    (found,) = [block for block in re.split(r"\n(?! {4})", out) if re.search(pattern, block)]
    assert file in found and str(tmp_path) in found
    if name not in ("again", "validation"):  # these are one thing seen from two sides
        assert len(re.findall(r"\(\d+\): ", out)) == 1, out


def test_sound_pairs_are_called_so_and_crops_are_no_fault(tmp_path, capsys):
    pairs(tmp_path)
    assert check_data.main([str(tmp_path), "--size", "64"]) == 0
    assert capsys.readouterr().out == "6 pairs are good, 0 are bad\n"
    assert check_data.main([str(tmp_path), "--size", "256x128"]) == 0
    crop, enlarged, _ = capsys.readouterr().out.splitlines()
    assert "the crop to 256x128 takes 50%" in crop and "6 of 6 images are smaller than 256x128" in enlarged


def test_the_sheet_shows_pairs_as_training_sees_them(tmp_path, capsys):
    """The middle of each wide picture, and its hint on it."""
    pairs(tmp_path / "pairs", 0)
    for i in range(20):
        for kind, colour in (("images", (10 * i, 0, 0)), ("hints", (0, 10 * i, 0))):
            pixels = np.full((64, 192, 3), 255, np.uint8)
            pixels[:, 64:128] = colour
            Image.fromarray(pixels).save(tmp_path / f"pairs/{kind}/{i:02}.png")
        (tmp_path / f"pairs/images/{i:02}.txt").write_text("a caption")
    (tmp_path / "pairs/images/00.png").write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    assert check_data.main([str(tmp_path / "pairs"), "--size", "64", "--sheet", str(sheet)]) == 1
    assert f"16 pairs as training sees them: {sheet}" in capsys.readouterr().out
    with Image.open(sheet) as image:
        pixels = np.asarray(image)
    height, width = pixels.shape[0] // 4, pixels.shape[1] // 4
    seen = []
    for top in range(0, 4 * height, height):
        for left in range(0, 4 * width, width):
            image, hint = pixels[top + 100, left + 100], pixels[top + 100, left + 330]
            assert image[0] == hint[1] and image[1] == hint[0] == 0
            assert (pixels[top + 226 : top + 280, left : left + 448] < 128).any()  # the caption
            seen.append(int(image[0]) // 10)
    assert seen == sorted(set(seen)) and 0 not in seen and len(seen) == 16


def test_hints_of_a_detector_are_looked_at_as_well(tmp_path, capsys):
    for i in range(3):
        Image.new("RGB", (64, 64), (i, 99, 0)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"target": f"{i}.png", "source": "", "prompt": "x"}) for i in range(3)]
    (tmp_path / "prompt.json").write_text("\n".join(lines))
    assert check_data.main([str(tmp_path), "--size", "64", "--detect", "canny"]) == 1
    assert "black hints (3): nothing was found" in capsys.readouterr().out


def test_pairs_of_which_none_can_be_used_are_nothing_to_train_on(tmp_path, capsys):
    for path in pairs(tmp_path, 2).glob("images/*.png"):
        path.write_bytes(b"no image")
    assert check_data.main([str(tmp_path)]) == 2
    assert capsys.readouterr().out.endswith("0 pairs are good, 2 are bad\n")


@pytest.mark.parametrize("size", ["0", "0x512", "100"])
def test_a_size_that_no_base_makes_is_a_sentence(tmp_path, capsys, size):
    assert check_data.main([str(pairs(tmp_path, 2)), "--size", size]) == 2
    assert "expected multiples of 32" in capsys.readouterr().err


def test_a_place_without_a_sheet_is_seen_before_the_pairs_are(tmp_path, capsys):
    assert check_data.main([str(pairs(tmp_path, 2)), "--size", "64", "--sheet", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "expected the name of a file ending in .png" in said.err and said.out == ""


def test_a_folder_of_nothing_is_one_sentence(tmp_path, capsys):
    assert check_data.main([str(tmp_path)]) == 2
    assert "no layout that is known" in capsys.readouterr().err
    (tmp_path / "prompt.json").write_text("{}\n[]")
    assert check_data.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "prompt.json:1" in error and "tools.check_data" not in error


@pytest.mark.parametrize("words", [["--prompt", ""], ["--prompt-dropout", "1"]])
def test_photographs_without_captions_are_checked_as_they_are_trained_on(tmp_path, capsys, words):
    for i in range(2):
        draw_hint(tmp_path / f"{i}.png", 100 + i, 255)
    command = [str(tmp_path), "--size", "64", "--detect", "canny"]
    assert check_data.main(command) == 2
    assert "or --prompt TEXT for all pairs, or --prompt-dropout 1" in capsys.readouterr().err
    assert check_data.main(command + words) == 0
    assert capsys.readouterr().out == "2 pairs are good, 0 are bad\n"


def test_a_sheet_is_no_picture_of_the_pairs(tmp_path, capsys):
    sheet = tmp_path / "hints/sheet.png"
    assert check_data.main([str(pairs(tmp_path, 2)), "--size", "64", "--sheet", str(sheet)]) == 2
    assert "in the folder of pairs, of which it would become a part" in capsys.readouterr().err and not sheet.exists()


def test_a_name_that_is_no_folder_is_told_what_is_read(tmp_path, capsys):
    assert check_data.main([str(tmp_path / "fill50k")]) == 2
    assert capsys.readouterr().err.endswith('fill50k" does not exist: give a folder of pairs\n')
