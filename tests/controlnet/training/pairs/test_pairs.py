"""The layouts of data sets: each a line of files, and the pairs that are found in them."""

import errno
import json
import os
import sys
import unicodedata
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from PIL import Image

from controlnet.common.image_files import read_image
from controlnet.training.pairs import Wanted, recognise

ROW = {"source": "s/0.png", "target": "t/0.png", "prompt": "zero"}
PAIR = {"t/0.png": "", "s/0.png": ""}  # the files of ROW
IMAGEFOLDER = {"file_name": "t/0.png", "conditioning_image": "s/0.png", "text": "zero"}
TWO_COLUMNS = {"image_file_name": "t/0.png", "conditioning_image_file_name": "s/0.png", "text": "zero"}
NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
ZERO = ("t/0.png", "s/0.png", "zero")


def lay(folder, files):
    """Files with text or bytes in them; no layout needs an image's content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def pairs_of(folder, **wanted):
    """(image, hint, caption) of each, by names from the folder."""
    names = [(entry.image, entry.hint, entry.caption) for entry in recognise(folder, Wanted(**wanted)).entries]
    return [(str(i.relative_to(folder)), h and str(h.relative_to(folder)), c) for i, h, c in names]


def fill50k(**changed):
    """prompt.json with these values in place of ROW's, and the pair."""
    return {"prompt.json": json.dumps(ROW | changed, ensure_ascii=False), **PAIR}


def trio(above="", below="", text="zero"):
    """Three folders, inside others or with others inside."""
    names = {"images": ".png", "hints": ".png", "captions": ".txt"}
    return {f"{above}{folder}{below}/0{end}": text for folder, end in names.items()}


def pair_of_trio(above="", below="", text="zero"):
    return f"{above}images{below}/0.png", f"{above}hints{below}/0.png", text


# name -> the files, and the pairs that are in them
LAYOUTS = {
    "fill50k": (fill50k(), [ZERO]),
    "an array": ({"prompt.json": json.dumps([ROW, ROW], indent=2), **PAIR}, [ZERO, ZERO]),
    "Windows' lines and mark": ({"prompt.json": f"\ufeff{json.dumps(ROW)}\r\n{json.dumps(ROW)}", **PAIR}, [ZERO, ZERO]),
    "UTF-16": ({"prompt.json": json.dumps(ROW).encode("utf-16"), **PAIR}, [ZERO]),
    "a separator in a caption": (fill50k(prompt="a\u2028b\x85c"), [(*ZERO[:2], "a\u2028b\x85c")]),
    "Windows' paths": (fill50k(source=r"S\0.PNG", target=r".\t\0.png"), [ZERO]),
    "another disk": (fill50k(source=r"D:\a\s\0.png", target="/home/b/t/0.png"), [ZERO]),
    "accents in a table": (
        {**fill50k(source=f"{NFC}.png"), f"{NFD}.png": ""},
        [("t/0.png", f"{NFD}.png", "zero")],
    ),
    "imagefolder": ({"metadata.jsonl": json.dumps(IMAGEFOLDER), **PAIR}, [ZERO]),
    "two image columns": ({"metadata.jsonl": json.dumps(TWO_COLUMNS), **PAIR}, [ZERO]),
    "csv": ({"metadata.csv": 'image,hint,caption\nt/0.png,s/0.png,"a, b\nc"\n', **PAIR}, [(*ZERO[:2], "a, b\nc")]),
    "csv of a spreadsheet": (
        {"metadata.csv": "Image;Control Image;Text\r\nt/0.png;s/0.png;a, b\r\n", **PAIR},
        [(*ZERO[:2], "a, b")],
    ),
    "a table under train/": (
        {"train/metadata.csv": "file_name,control,text\n0.png,c.png,zero\n", "train/0.png": "", "train/c.png": ""},
        [("train/0.png", "train/c.png", "zero")],
    ),
    "parallel folders": (trio(), [pair_of_trio()]),
    "other usual names": (
        {"Image/0.tif": "", "conditioning images/0.npy": "", "text/0.caption": "zero"},
        [("Image/0.tif", "conditioning images/0.npy", "zero")],
    ),
    "named after the detector": (
        {"target/0.webp": "", "canny/0.png": "", "target/0.txt": "zero"},
        [("target/0.webp", "canny/0.png", "zero")],
    ),
    "nested below": (trio() | trio(below="/sub", text="one"), [pair_of_trio(), pair_of_trio(below="/sub", text="one")]),
    "nested above": (trio("a/") | trio("b/", text="one"), [pair_of_trio("a/"), pair_of_trio("b/", text="one")]),
    "train/ beside test/": (trio("train/") | trio("test/", text="one"), [pair_of_trio("train/")]),
    "accents in folders": (
        {f"images/{NFC}.png": "", f"hints/{NFD}.png": "", f"images/{NFD}.txt": "zero"},
        [(f"images/{NFC}.png", f"hints/{NFD}.png", "zero")],
    ),
    "macOS' own files": ({**trio(), "images/._0.png": "", "__MACOSX/images/1.png": ""}, [pair_of_trio()]),
    "sd-scripts": (
        {"train/10_circle/0.png": "", "train/10_circle/0.txt": "zero", "cond/0.png": ""},
        [("train/10_circle/0.png", "cond/0.png", "zero")],
    ),
    "hints beside": (
        {"0.jpg": "", "0_hint.png": "", "0.jpg.txt": "zero", "1.jpg": "", "1.canny.png": "", "1.txt": "one"},
        [("0.jpg", "0_hint.png", "zero"), ("1.jpg", "1.canny.png", "one")],
    ),
    "ends for both": (
        {"0_target.png": "", "0_source.png": "", "0.txt": "zero"},
        [("0_target.png", "0_source.png", "zero")],
    ),
    "names that differ by case": (
        {f"{folder}/{name}.png": "" for folder in ("images", "hints") for name in "aA"}
        | {"text/a.txt": "a", "text/A.txt": "A", "images/a.txt": "not this", "text/a.caption": "nor this"},
        [(f"images/{name}.png", f"hints/{name}.png", name) for name in "Aa"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_recognised(tmp_path, name):
    files, expected = LAYOUTS[name]
    lay(tmp_path, files)
    assert pairs_of(tmp_path) == expected
    assert not recognise(tmp_path, Wanted()).problems
    without_hints = [(image, None, caption) for image, _, caption in expected]
    assert pairs_of(tmp_path, hints=False) == without_hints


def test_a_table_may_be_parquet(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    lay(tmp_path, PAIR)
    parquet.write_table(pyarrow.Table.from_pylist([IMAGEFOLDER]), tmp_path / "metadata.parquet")
    assert pairs_of(tmp_path) == [ZERO]


@pytest.mark.parametrize("words, said", [("", "OSError"), ("first\nand more", "first")])
def test_a_damaged_parquet_is_one_sentence_whatever_its_reader_says(tmp_path, monkeypatch, words, said):
    reader = SimpleNamespace(read_table=Mock(side_effect=OSError(words)))
    monkeypatch.setitem(sys.modules, "pyarrow", Mock())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", reader)
    with pytest.raises(ValueError, match=rf"is not readable as PARQUET \({said}\): write it again"):
        recognise(lay(tmp_path, {"metadata.parquet": "PAR1"}), Wanted())


def test_parquet_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="metadata.parquet needs the package pyarrow"):
        recognise(lay(tmp_path, {"metadata.parquet": "PAR1"}), Wanted())


def test_photographs_are_enough_where_hints_are_made(tmp_path):
    lay(tmp_path, {"a/0.jpg": "", "a/0.txt": "zero", "b/1.PNG": "", "film.mp4": ""})
    assert pairs_of(tmp_path, hints=False, captions=False) == [("a/0.jpg", None, "zero"), ("b/1.PNG", None, "")]
    with pytest.raises(ValueError, match="2 images and no hints: add --detect"):
        recognise(tmp_path, Wanted())


def test_a_prompt_stands_for_all_captions_whatever_they_are(tmp_path):
    lay(tmp_path / "a", {"images/0.png": "", "hints/0.png": "", "images/0.txt": b"\xff\xe9 garbage"})
    lay(tmp_path / "b", {"prompt.json": json.dumps(ROW | {"prompt": None}), **PAIR})
    for folder in "ab":
        for prompt in ("a bird", ""):
            assert [caption for *_, caption in pairs_of(tmp_path / folder, prompt=prompt)] == [prompt]


def test_missing_captions_are_counted_where_none_is_needed(tmp_path):
    files = {f"{folder}/{i}.png": "" for folder in ("images", "hints") for i in range(3)}
    lay(tmp_path, files | {"captions/0.txt": " ", "captions/1.txt": "one"})
    listing = recognise(tmp_path, Wanted(captions=False))
    assert [entry.caption for entry in listing.entries] == ["", "one", ""]
    assert listing.summary() == "folders captions/, hints/, images/: 3 pairs, 2 of them without a caption"
    problems = recognise(tmp_path, Wanted()).problems
    assert "captions/0.txt is empty" in problems[0] and "images/2.png has no caption" in problems[1]
    assert all("--prompt TEXT for all pairs" in problem for problem in problems)


def test_what_is_left_out_is_named(tmp_path):
    files = {"images/0.png": "", "hints/0.png": "", "images/0.txt": "zero"}
    lay(
        tmp_path,
        files | {"hints/7.png": "", "hints/8.png": "", "captions/9.txt": "nine", "images/1.heic": "", "a.png": ""},
    )
    said = recognise(tmp_path, Wanted()).summary()
    assert "1 pairs, left out: hints without an image (2: hints/7.png ...)" in said
    assert "captions without an image (1: captions/9.txt), other files (2: a.png ...)" in said
    table = f"image,hint,text\n{','.join(ZERO)}\n"
    lay(tmp_path / "x", {f"{part}/metadata.csv": table for part in ("train", "val")} | {"train/data.csv": table})
    said = recognise(tmp_path / "x", Wanted()).summary()
    assert said == "train/metadata.csv: 1 pairs, left out: train/data.csv, val/"
    assert "hints that are there (3: hints/0.png ...)" in recognise(tmp_path, Wanted(hints=False)).summary()


def test_what_is_ambiguous_is_no_pair(tmp_path):
    two = {"images/0.png": "", "canny/0.png": "", "depth/0.png": "", "images/0.txt": "zero"}
    same_stem = {
        "images/a/0.png": "",
        "images/b/0.png": "",
        "hints/0.png": "",
        "images/a/0.txt": "",
        "images/b/0.txt": "",
    }
    lost_folder = {"prompt.json": json.dumps(ROW | {"source": r"D:\s\0.png", "target": r"D:\t\0.png"}), "0.png": ""}
    for i, (files, words) in enumerate([(two, "two hints"), (same_stem, "no hint"), (lost_folder, "both lead to")]):
        with pytest.raises(ValueError, match=f"no pair to train on: .*{words}"):
            recognise(lay(tmp_path / str(i), files), Wanted(captions=False))


def test_sd_scripts_repeats_count_in_their_ratio(tmp_path):
    files = {f"{folder}/{name}.{end}": "x" for folder, name in (("10_a", "p"), ("5_b", "q")) for end in ("png", "txt")}
    listing = recognise(lay(tmp_path / "both", files), Wanted(hints=False))
    assert [(entry.image.stem, entry.repeats) for entry in listing.entries] == [("p", 2), ("q", 1)]
    assert "sd-scripts' folders, some repeated 2 times" in listing.summary()
    years = {f"{year}_trip/{year}.png": "" for year in ("2022", "2023", "004")}
    assert {
        e.repeats for e in recognise(lay(tmp_path / "years", years), Wanted(hints=False, captions=False)).entries
    } == {1}


def test_what_describes_no_pair_is_listed_with_its_line(tmp_path):
    odd = [{"target": "a", "prompt": "x"}, ROW | {"prompt": " "}, [1], {"prompt": "x"}]
    odd += [ROW | {"source": name} for name in ("x" * 256, "a/" * 2500 + "0.png", "\ud83d.png")]
    odd += [ROW | {"target": {"bytes": "", "path": "0.png"}}, ROW | {"prompt": ["a", "b"]}, ROW | {"source": 5}]
    rows = [json.dumps(row) for row in odd]
    deep = "[" * 200 + "]" * 200
    text = "\n".join([json.dumps(ROW), "", "{broken", *rows, deep])
    listing = recognise(lay(tmp_path, {"prompt.json": text}), Wanted())
    assert len(listing.entries) == 1
    expected = [
        "3 is not JSON",
        "4 names no hint",
        "5 has no caption",
        "6 is list",
        "7 names no image",
        f'8 names "{"x" * 40} ...", which no file',
        f'9 names "{"a/" * 20} ...", which no file',
        '10 names "\ud83d.png ...", which no file',
        '11 holds a picture itself as "target", expected a file\'s name',
        '12 has list as "prompt", expected one text',
        '13 has int as "source", expected one text, or add --detect',
        "14 cannot be read",
    ]
    for problem, words in zip(listing.problems, expected, strict=True):
        assert problem.startswith(f"{tmp_path}/prompt.json:{words}")


WRONG = {
    "nothing": (None, "does not exist"),
    "a file": ("", "is a file"),
    "an empty folder": ({}, "no layout that is known"),
    "no pairs": ({"prompt.json": "{}"}, "no pair to train on"),
    "a file that is not there": ("x.tar", "does not exist"),
    "a broken array": ({"prompt.json": "[{"}, "not readable as JSON"),
    "a deep array": ({"prompt.json": "[" * 100_000}, "nested deeper"),
    "an open quote": ({"metadata.csv": "image,text\n" + "a" * 200_000}, "not readable as CSV"),
    "another encoding": ({"prompt.json": "caf\xe9".encode("latin-1")}, "looks like Latin-1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_data_set_is_one_sentence(tmp_path, name):
    content, words = WRONG[name]
    folder = tmp_path / "data"
    if isinstance(content, dict):
        folder.mkdir()
        lay(folder, content)
    elif content == "":
        folder.touch()
    else:
        folder = folder / (content or "")
    with pytest.raises(ValueError, match=words) as caught:
        recognise(folder, Wanted())
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = lay(tmp_path / "elsewhere", {"0.png": "", "0.txt": "zero"})
    lay(tmp_path / "set", {"hints/0.png": ""})
    (tmp_path / "set" / "images").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(tmp_path / "set")
    listing = recognise(tmp_path / "set", Wanted())
    assert len(listing.entries) == 1 and not listing.problems and not listing.left_out


@pytest.mark.parametrize("end", ["sgi", "dds", "qoi", "mpo", "pcx", "avif", "jp2", "tif"])
def test_a_picture_of_any_raster_format_is_one(tmp_path, end):
    lay(tmp_path, {"images/0.txt": "zero", "hints/0.png": ""})
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / f"0.{end}")
    assert pairs_of(tmp_path) == [(f"images/0.{end}", "hints/0.png", "zero")]
    assert read_image(tmp_path / "images" / f"0.{end}").getpixel((4, 4))[0] > 240


def test_a_page_of_postscript_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="no layout that is known"):
        recognise(lay(tmp_path, {"images/0.eps": "", "images/1.pdf": "", "hints/0.ps": ""}), Wanted())


def test_a_run_inside_its_data_is_no_part_of_them(tmp_path):
    """Grids and examples are pictures, too: the next run, or this one resumed, would train on them."""
    lay(tmp_path, {"0.jpg": "", "0_hint.png": "", "0.txt": "zero"})
    before = recognise(tmp_path, Wanted()).entries
    made = {"settings.json": "{}", "state/000001.pt": "", "samples/000001.png": "", "example.png": ""}
    lay(tmp_path / "more/run", made)
    listing = recognise(tmp_path, Wanted())
    assert listing.entries == before and not listing.problems
    assert listing.left_out == ["other files (1: more/run)"]


@pytest.mark.parametrize("suffix, comma, said", [("csv", ",", '","'), ("csv", ";", '";"'), ("tsv", "\t", "a tab")])
def test_a_row_of_more_cells_than_its_header_is_no_pair(tmp_path, suffix, comma, said):
    """An unquoted comma would cut its caption. Empty cells at the end, and spaces before a quote, mean nothing."""
    rows = ["image,hint,text", "a.png,b.png,a cat, with a hat", 'a.png, b.png, "a cat%s a hat",,', "a.png,b.png"]
    rows.append("a.png,b.png,nan")  # pandas' missing cell, as text
    lay(tmp_path, {f"metadata.{suffix}": "\n".join(rows).replace(",", comma).replace("%s", comma)})
    assert pairs_of(tmp_path) == [("a.png", "b.png", f"a cat{comma} a hat")]
    longer, shorter, missing = recognise(tmp_path, Wanted()).problems
    assert f"metadata.{suffix}:2 has 4 cells, its header 3: put a text with {said} in it into double quotes" in longer
    assert f"metadata.{suffix}:4 has no caption" in shorter and f"metadata.{suffix}:5 has no caption" in missing


@pytest.mark.parametrize("row", ['a.png,b.png,"a cat', 'a.png,b.png,"a cat\na.png,b.png,"a dog"'])
def test_a_quote_that_is_not_closed_is_named_with_its_line(tmp_path, row):
    with pytest.raises(ValueError, match=r'metadata.csv" is not readable as CSV \(in the row from line 3 on, .*\): '):
        recognise(
            lay(tmp_path, {"metadata.csv": f"image,hint,text\na.png,b.png,zero\n{row}\na.png,b.png,one\n"}), Wanted()
        )


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    lay(tmp_path, {"images/0.png": "", "secret/1.png": ""})
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match='secret" cannot be read .Permission denied.: make it readable, or move it'):
        recognise(tmp_path, Wanted(hints=False, captions=False))
