"""Files of others: read within limits, and refused in one sentence."""

import io
import json
import os
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from controlnet.common import files
from controlnet.common.files import parse_json, read_arrays, read_json
from controlnet.common.image_files import open_image, read_image
from controlnet.common.program import run
from controlnet.hints.openpose import read_pose

POSTSCRIPTS = {
    "plain": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n",
    "with a preview": b"\xc5\xd0\xd3\xc6"
    + (32).to_bytes(4, "little")
    + (90).to_bytes(4, "little")
    + bytes(20)
    + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n",
}


@pytest.mark.parametrize("kind", POSTSCRIPTS)
@pytest.mark.parametrize("name", ["file.png", "file.jpg", "file.eps"])
def test_postscript_starts_no_other_program(tmp_path, monkeypatch, kind, name):
    marker, program, path = tmp_path / "started", tmp_path / "gs", tmp_path / name
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path.write_bytes(POSTSCRIPTS[kind])
    with pytest.raises(ValueError, match="expected PNG, JPEG"):
        open_image(path)
    assert not marker.exists()
    with Image.open(path) as image, pytest.raises(OSError):  # the test means something: by itself Pillow would
        image.load()
    assert marker.exists()


@pytest.mark.parametrize("size", [(10_001, 10_000), (16_385, 1), (1, 60_000)])
def test_images_too_large_to_decode(tmp_path, size, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", size).save(tmp_path / "bomb.png")
    started = time.process_time()
    with pytest.raises(
        ValueError, match=f"has {size[0]}x{size[1]} pixels, expected at most 16384 a side and 100 million"
    ):
        open_image(tmp_path / "bomb.png")
    assert time.process_time() - started < 0.2


def test_every_format_is_read_as_before(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "tga", "jp2", "pcx"):
        image.save(tmp_path / f"image.{suffix}")
        read = read_image(tmp_path / f"image.{suffix}")
        assert read.size == (30, 40)
        assert suffix in ("jpg", "webp", "gif", "jp2") or np.array_equal(read, image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_are_laid_over_white_in_strips(mode, tmp_path):
    channels = {"RGBA": (4,), "LA": (2,), "P": ()}[mode]
    numbers = np.random.default_rng(0).integers(0, 256, (2050, 7, *channels), dtype=np.uint8)
    image = Image.fromarray(numbers).convert(mode)
    image.save(tmp_path / "image.png", **({"transparency": 7} if mode == "P" else {}))
    whole = Image.open(tmp_path / "image.png").convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    assert np.array_equal(read_image(tmp_path / "image.png"), expected)


@pytest.mark.parametrize(
    "text", ["[" * 200 + "]" * 200, "[" * 2000 + "]" * 2000, '{"a":' * 10**5, "[" * 10**6, "", "nul"]
)
def test_json_that_is_refused(tmp_path, text):
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "file.json").write_text(text)
    for read in (read_json, read_pose):
        with pytest.raises(ValueError):
            read(tmp_path / "file.json")


def test_json_that_is_read(tmp_path):
    value = {"a": [1, {"b": None}], "c": "x" * 10**6}
    (tmp_path / "file.json").write_text("\ufeff" + json.dumps(value))  # with a byte-order mark
    assert read_json(tmp_path / "file.json") == value
    with open(tmp_path / "file.json", "r+b") as sparse:
        sparse.truncate(6 * 10**9)
    for read in (read_json, read_pose):
        with pytest.raises(ValueError, match="has 6000000000 bytes, expected at most"):
            read(tmp_path / "file.json")


def test_a_crowd_is_no_pose(tmp_path):
    (tmp_path / "pose.json").write_text(json.dumps({"people": [{"pose_keypoints_2d": [1] * 54}] * 301}))
    with pytest.raises(ValueError, match="301 people, expected at most 300"):
        read_pose(tmp_path / "pose.json")


def test_arrays_that_unpack_to_gigabytes(tmp_path, monkeypatch):
    """Here to 10 MB, of which 4 are allowed."""
    assert files.LARGEST_ARRAY == 400_000_000
    monkeypatch.setattr(files, "LARGEST_ARRAY", 4_000_000)
    path = tmp_path / "bomb.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**7,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        member.write(header.getvalue() + bytes(10**7))
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match="bytes when unpacked, expected at most 4000000"):
        read_arrays(path)
    with open(tmp_path / "sparse.npy", "wb") as sparse:
        sparse.write(header.getvalue())
        sparse.truncate(10**7)
    with pytest.raises(ValueError, match="expected at most 4000000"):
        read_arrays(tmp_path / "sparse.npy")
    np.savez(path, a=np.ones(3), b=np.zeros(2))
    assert {name: array.tolist() for name, array in read_arrays(path).items()} == {"a": [1, 1, 1], "b": [0, 0]}


def test_sentences_hold_no_commands_to_the_terminal(capsys):
    def fail():
        raise ValueError("a\x1b]0;title\x07b\r\nc\u202ed" + "e" * 10**5)

    assert run("program", fail) == 2
    said = capsys.readouterr().err
    assert said.startswith("program: a?]0;title?b? c?de") and len(said) < 4000 and said.count("\n") == 1
