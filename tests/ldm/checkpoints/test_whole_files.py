"""Files and folders that are there whole or not at all, whoever else writes beside them."""

import os

import pytest

from ldm.checkpoints.files import new_file, new_folder, remove_leftovers


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_two_processes_may_write_one_name_at_once(tmp_path, monkeypatch, make):
    path = tmp_path / "result"
    with make(path) as first:
        monkeypatch.setattr(os, "getpid", lambda: 4242)
        with pytest.raises(RuntimeError), make(path) as second:  # the other one fails, or is stopped
            assert first != second and not path.exists()
            raise RuntimeError
        if make is new_file:
            first.write_text("whole")
    assert path.exists() and [file.name for file in tmp_path.iterdir()] == ["result"]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    kept = [".lock", ".DS_Store", ".mine.tmp", "a.1.tmp", ".a.x.tmp", "result"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".control.safetensors.123.tmp").mkdir()
    (tmp_path / ".control.safetensors.123.tmp" / ".tmpAbCdEf").touch()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
