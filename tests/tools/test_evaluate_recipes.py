"""The measures of the recipes: what is wanted, what ignores the hint, and what ignores the rest."""

from dataclasses import replace

import numpy as np
import pytest
from small import SMALLEST, small_control, small_sd

from controlnet.training.options import TrainSettings
from controlnet.training.recipes import RECIPES
from controlnet.training.run_state import RunFolder
from controlnet.training.sources import WorldSource
from controlnet.worlds import Edits
from tools import evaluate, evaluate_recipes
from tools.evaluate_recipes import MEASURES, edited, inpainted, shuffled, tiled

SIZE = (64, 64)


def samples(world, detect, count=4):
    source = WorldSource(world, SIZE, count, detect=detect)
    return [source.sample(i) for i in range(count)]


def test_every_recipe_has_a_measure():
    assert MEASURES.keys() == RECIPES.keys()


def test_tiles_have_what_the_hint_shows_and_sharp_details():
    one, other = samples("scenes", "tile", 2)
    near, detail = tiled(one.image, one)
    assert detail == pytest.approx(1) and near > 20
    assert tiled(one.hint, one) == (float("inf"), 0)  # the hint itself lacks all detail
    assert tiled(other.image, one)[0] < near - 5


def test_inpainting_keeps_what_is_around_and_goes_on_in_the_hole():
    for sample in samples("shapes", "inpaint"):
        hole = (sample.hint < 0).all(axis=2)
        assert inpainted(sample.image, sample)[:2] == (0, 0) and inpainted(sample.image, sample)[2] > 0.8
        negative = np.where(hole[..., None], 255 - sample.image, sample.image)
        outside, inside, _ = inpainted(negative, sample)
        assert outside == 0 < inside
        outside, inside, _ = inpainted(np.where(hole[..., None], sample.image, 255 - sample.image), sample)
        assert inside == 0 < outside
    ground = sample.image[np.unravel_index(np.argmax(~sample.mask), sample.mask.shape)]
    without = np.broadcast_to(ground, sample.image.shape)  # no figure anywhere
    assert inpainted(without, replace(sample, mask=hole))[2] == 0
    assert len(inpainted(*[(s.image, s) for s in samples("scenes", "inpaint", 1)][0])) == 2  # no plain ground


def test_a_shuffled_picture_has_its_hints_palette():
    one, other = samples("scenes", "shuffle:cell=32", 2)
    assert shuffled(one.hint, one) == (0,) and shuffled(one.image, one)[0] < shuffled(other.image, one)[0]


def test_an_edit_changes_what_it_was_told_to_and_nothing_else():
    for sample in (Edits(64)[i] for i in range(6)):
        told, change, elsewhere = edited(sample.image, sample)
        assert told == change == 1 and elsewhere < 2  # levels that a slight change of the light makes
        assert edited(sample.hint, sample) == (0, 0, 0)  # nothing done
        half = ((sample.image.astype(int) + sample.hint) / 2).astype(np.uint8)
        assert edited(half, sample)[1] == pytest.approx(0.5, abs=0.02)
        assert edited(255 - sample.image, sample)[2] > 20


def test_a_run_of_a_recipe_is_measured_on_its_own_validation_pairs(tmp_path, monkeypatch, capsys):
    sd = small_sd(SMALLEST)
    base, out = tmp_path / "base.safetensors", tmp_path / "run"
    sd.save(base)
    small_control(sd).save(tmp_path / "other.safetensors")
    settings = TrainSettings(recipe="shuffle", data="fill50k", size="96", detect="shuffle:cell=48")
    out.mkdir()
    RunFolder(out).begin(0, settings, {})
    small_control(sd).save(out / "control.safetensors")
    sizes, made = [], evaluate_recipes.image_for
    monkeypatch.setattr(evaluate_recipes, "image_for", lambda *a, **s: sizes.append(a[2].hint.shape) or made(*a, **s))
    words = ["--base", str(base), "--count", "2", "--steps", "1", "--device", "cpu"]
    assert evaluate.main([*words, "--recipe", "shuffle", str(out)]) == 0
    assert evaluate.main([*words, "--recipe", "inpaint", str(tmp_path / "other.safetensors")]) == 0
    *_, run, file = capsys.readouterr().out.splitlines()
    assert run.startswith("recipe shuffle, 2 samples, distance of the palette to the hint's without a prompt ")
    assert run.count("(mismatched ") == 1 and file.count("(mismatched ") == 3 and "IoU with the figure" in file
    assert sizes == 2 * [(96, 96, 3)] + 2 * [(64, 64, 3)]
    assert evaluate.main([*words, "--recipe", "tile", str(out)]) == 2
    assert "no run of train.py --recipe tile" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said_before_anything_is_loaded(capsys):
    base = ["--base", "none.safetensors"]
    assert evaluate.main([*base, "--recipe", "blur", "runs/blur"]) == 2
    assert 'there is no recipe "blur", expected one of tile, ' in capsys.readouterr().err
    for words in (["--control", "fill50k", "control.safetensors"], ["--base-only"]):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*base, "--recipe", "tile", "runs/tile", *words])
        assert f"{words[0]}: not allowed with argument --recipe" in capsys.readouterr().err
