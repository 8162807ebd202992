"""Where images go, with several processes at once."""

from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from PIL import Image

from controlnet.inference import saving
from controlnet.inference.saving import save_hints, save_image

ROUNDS = 10


def save_many(out, colour, links, together):
    if not links:
        saving.os.link = fail
    for _ in range(ROUNDS):
        together.wait(timeout=60)
        path = save_image(Image.new("RGB", (8, 8), colour), out, 0, 1, {})
        with open(out / f"taken by {colour}", "a") as taken:
            taken.write(f"{path}\n")


def fail(*_):
    raise OSError("no links here")


@pytest.mark.parametrize("links", [True, False])
def test_no_two_processes_take_the_same_number(tmp_path, links):
    together = forked.CONTEXT.Barrier(2)
    processes = [forked.start(save_many, tmp_path, i, links, together) for i in range(2)]
    for i, process in enumerate(processes):
        process.join()
        paths = (tmp_path / f"taken by {i}").read_text().splitlines()
        assert process.exitcode == 0 and len(paths) == ROUNDS
        assert all(Image.open(path).getpixel((0, 0))[0] == i for path in paths)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{i:04d}.png" for i in range(1, 2 * ROUNDS + 1)]


@pytest.mark.parametrize("links", [True, False])
def test_a_number_that_was_taken_meanwhile_is_not_taken_again(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(saving.os, "link", fail)
    (tmp_path / "0001.png").write_bytes(b"mine")
    monkeypatch.setattr(saving, "next_number", lambda folder: 1)
    assert save_image(Image.new("RGB", (8, 8)), tmp_path, 0, 1, {}) == tmp_path / "0002.png"
    assert (tmp_path / "0001.png").read_bytes() == b"mine"


@pytest.mark.parametrize("out", ["folder", "folder/a.png"])
def test_a_full_disk_is_a_sentence_with_the_place_and_leaves_nothing(tmp_path, monkeypatch, out):
    def fail(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(ValueError, match=rf'saved as ".*{out}" \(No space left on device\): make room there, or give'):
        save_image(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), tmp_path / out, 0, 1, {})
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_hint_beside_an_image_takes_no_other_s_place_in_silence(tmp_path, capsys):
    """In a folder its image takes a number that no hint has; beside a file of a given name it is said."""
    control = SimpleNamespace(hint=torch.zeros(1, 3, 8, 8))
    (tmp_path / "0004-hint-2.png").write_bytes(b"mine")
    assert save_image(Image.new("RGB", (8, 8)), tmp_path, 0, 1, {}) == tmp_path / "0005.png"
    (tmp_path / "a-hint.png").write_bytes(b"mine")
    save_hints((control,), tmp_path / "a.png")
    assert f"{tmp_path / 'a-hint.png'} is replaced\n" in capsys.readouterr().err
