"""tools.make_data and tools.check_data, and that training reads what the one writes as the other says."""

import json

import numpy as np
import pytest
from PIL import Image

from controlnet.training.folders import list_folder
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
    source, world = FolderSource("x", list_folder(out).entries, Transform((64, 64))), WORLDS[name](64, 5)
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
        assert sum(words in problem for problem in problems) == 1, words


def test_a_folder_of_nothing_is_one_sentence(tmp_path, capsys):
    assert check_data.main([str(tmp_path)]) == 2
    assert "no layout that is known" in capsys.readouterr().err
