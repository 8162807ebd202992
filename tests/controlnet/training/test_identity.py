"""Files are known by their contents."""

import os
import tracemalloc

import pytest

from controlnet.training.identity import ENDS, differences, digest_of_file, digests_of_files

LARGE = bytes(range(256)) * (ENDS // 64)  # four times as much as one end


@pytest.mark.parametrize(
    "name, at, noticed",
    [
        ("a.png", 0, True),
        ("a.png", -1, True),
        ("a.png", 2 * ENDS + 5, False),  # in the middle of what is compressed: its end would differ, too
        ("a.tar", 2 * ENDS + 5, False),  # gigabytes: an archive is written once
        ("a.bmp", 2 * ENDS + 5, True),
        ("a.npy", 2 * ENDS + 5, True),
    ],
)
def test_an_edit_is_noticed_where_a_format_shows_it(tmp_path, name, at, noticed):
    path, edited = tmp_path / name, bytearray(LARGE)
    path.write_bytes(LARGE)
    before = digest_of_file(path)
    edited[at] ^= 1
    path.write_bytes(edited)
    assert (digest_of_file(path) != before) == noticed
    path.write_bytes(LARGE[:ENDS] + LARGE)
    assert digest_of_file(path) != before


def test_a_large_file_takes_little_memory(tmp_path):
    """Many are read at once."""
    for name in ("a.npy", "a.tar"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(10_000_000)
        tracemalloc.start()
        digest_of_file(tmp_path / name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000


def test_neither_name_nor_time_counts_and_what_is_not_there_is_empty(tmp_path):
    (tmp_path / "a.png").write_bytes(LARGE)
    (tmp_path / "b.jpg").write_bytes(LARGE)
    os.utime(tmp_path / "b.jpg", (1, 1))
    a, b, none = digests_of_files([tmp_path / name for name in ("a.png", "b.jpg", "none.png")]).values()
    assert a == b != none == ""


def test_differences_name_what_differs_and_show_no_hashes():
    before, now = {"images": "a", "samples": 3, "base": "x"}, {"images": "b", "samples": 4, "base": "x"}
    assert differences(before, now) == "images, samples: 4 where 3 was" and differences(now, now) == ""
