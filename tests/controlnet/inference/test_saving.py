"""Where images go, with several processes at once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlnet.inference import saving
from controlnet.inference.saving import save_image

SAVE_MANY = """
import sys
from pathlib import Path
from PIL import Image
from controlnet.inference import saving
if sys.argv[3] == "no links":
    def fail(*_):
        raise OSError("no links here")
    saving.os.link = fail
for _ in range(30):
    image = Image.new("RGB", (8, 8), int(sys.argv[2]))
    print(saving.save_image(image, Path(sys.argv[1]), 0, 1, {}))
"""


@pytest.mark.parametrize("links", ["links", "no links"])
def test_no_two_processes_take_the_same_number(tmp_path, links):
    out = tmp_path / "new"
    commands = [[sys.executable, "-c", SAVE_MANY, out, str(i), links] for i in range(2)]
    root = Path(__file__).parents[3]
    runs = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for command in commands]
    for i, run in enumerate(runs):
        paths = run.communicate()[0].split()
        assert run.returncode == 0 and len(paths) == 30
        assert all(Image.open(path).getpixel((0, 0))[0] == i for path in paths)
    assert sorted(path.name for path in out.iterdir()) == [f"{i:04d}.png" for i in range(1, 61)]


@pytest.mark.parametrize("links", [True, False])
def test_a_number_that_was_taken_meanwhile_is_not_taken_again(tmp_path, monkeypatch, links):
    def fail(*_):
        raise OSError("no links here")

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
