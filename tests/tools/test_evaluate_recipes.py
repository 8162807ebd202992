"""The measures of the recipes: what is wanted, what ignores the hint, and what ignores the rest."""

import re
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
from tools.evaluate_recipes import MEASURES, edited, inpainted, measured, shuffled, tiled, told_another

SIZE = (64, 64)
PSNR, IOU = "PSNR to the picture at an eighth of its resolution", "IoU with the figure in the hole"


def samples(world, detect, count=4, **split):
    source = WorldSource(world, SIZE, count, detect=detect, **split)
    return [source.sample(i) for i in range(count)]


def test_every_recipe_has_a_measure():
    assert MEASURES.keys() == RECIPES.keys()


def test_tiles_are_the_picture_seen_small_and_as_sharp():
    one, other = samples("scenes", "tile", 2)
    near, sharpness = tiled(one.image, one).values()
    assert near == float("inf") and sharpness == pytest.approx(1)
    moved = np.roll(one.image, 4, axis=(0, 1))
    copied, none = tiled(one.hint, one).values()  # whose colours are right, but not where they are
    assert none == 0 and tiled(moved, one)[PSNR] < 30 and tiled(other.image, one)[PSNR] < copied < 30
    flat = np.full((64, 64, 3), 90, np.uint8)
    assert tiled(flat, replace(one, image=flat, hint=flat)).keys() == {PSNR}  # nothing was to be sharp


def test_inpainting_keeps_what_is_around_and_goes_on_in_the_hole():
    for sample in samples("shapes", "inpaint"):
        hole = (sample.hint < 0).all(axis=2)
        outside, inside, figure = inpainted(sample.image, sample).values()
        assert outside == inside == 0 and figure > 0.8
        negative = np.where(hole[..., None], 255 - sample.image, sample.image)
        outside, inside, _ = inpainted(negative, sample).values()
        assert outside == 0 < inside
        outside, inside, _ = inpainted(np.where(hole[..., None], sample.image, 255 - sample.image), sample).values()
        assert inside == 0 < outside
    ground = sample.image[np.unravel_index(np.argmax(~sample.mask), sample.mask.shape)]
    without = np.broadcast_to(ground, sample.image.shape)  # no figure anywhere
    assert inpainted(without, replace(sample, mask=hole))[IOU] == 0
    assert IOU not in inpainted(without, replace(sample, mask=sample.mask & ~hole))  # none was to be in the hole
    assert IOU not in inpainted(*[(s.image, s) for s in samples("scenes", "inpaint", 1)][0])  # no plain ground


def test_a_shuffled_picture_has_its_hints_palette():
    one, other = samples("scenes", "shuffle:cell=32", 2)
    (own,), (picture,), (another,) = (shuffled(image, one).values() for image in (one.hint, one.image, other.image))
    assert own == 0 and picture < another


def test_an_edit_changes_what_it_was_told_to_and_nothing_else():
    for sample in (Edits(64)[i] for i in range(6)):
        told, change, elsewhere = edited(sample.image, sample).values()
        assert told == change == 1 and elsewhere < 2  # levels that a slight change of the light makes
        assert set(edited(sample.hint, sample).values()) == {0}  # nothing done
        half = ((sample.image.astype(int) + sample.hint) / 2).astype(np.uint8)
        assert edited(half, sample)["share of the change"] == pytest.approx(0.5, abs=0.02)
        assert edited(255 - sample.image, sample)["error elsewhere"] > 20
    same = replace(sample, image=sample.hint)
    assert edited(sample.hint, same) == {"error elsewhere": 0}  # nothing was to change


def test_figures_are_of_the_samples_that_tell_them():
    two = samples("shapes", "inpaint", 2)
    asked = [two[0], replace(two[1], mask=np.zeros(SIZE, bool))]
    values = measured(inpainted, [255 - sample.image for sample in asked], asked)
    assert [len(one) for one in values.values()] == [2, 2, 1]
    assert values[IOU] == [inpainted(255 - two[0].image, two[0])[IOU]]


def test_another_instruction_is_never_the_own_one():
    night, rain = Edits(64)[0], replace(Edits(64)[1], caption="make it rain")
    night = replace(night, caption="make it night")
    asked = told_another([night, night, rain])
    assert [sample.caption for sample in asked] == ["make it rain", "make it rain", "make it night"]
    assert asked[1].hint is night.hint and asked[2].hint is rain.hint
    assert [sample.caption for sample in told_another([night, night])] == ["", ""]


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


@pytest.fixture(scope="module")
def files(sd, tmp_path_factory):
    """A base, a ControlNet, and a run of the recipe shuffle."""
    folder = tmp_path_factory.mktemp("files")
    run = folder / "run"
    run.mkdir()
    RunFolder(run).begin(0, TrainSettings(recipe="shuffle", data="fill50k", size="96", detect="shuffle:cell=48"), {})
    sd.save(folder / "base.safetensors")
    for file in (run / "control.safetensors", folder / "other.safetensors"):
        small_control(sd).save(file)
    return folder


def evaluated(files, recipe, file, *words):
    settings = ["--base", str(files / "base.safetensors"), "--count", "2", "--steps", "1", "--device", "cpu"]
    return evaluate.main([*settings, "--recipe", recipe, str(files / file), *words])


def test_a_run_of_a_recipe_is_measured_on_its_own_validation_pairs(files, monkeypatch, capsys):
    asked, painter = [], evaluate_recipes.painter

    def watched(*arguments):
        paint = painter(*arguments)
        return lambda samples: asked.extend(samples) or paint(samples)

    monkeypatch.setattr(evaluate_recipes, "painter", watched)
    assert evaluated(files, "shuffle", "run", "--recipe", "inpaint", str(files / "other.safetensors")) == 0
    run, *of_a_file = capsys.readouterr().out.splitlines()
    assert run.startswith("recipe shuffle, 2 samples, distance of the palette to the hint's, without a prompt: ")
    assert len(of_a_file) == 3 and all("mismatched" in line and "true pictures" in line for line in [run, *of_a_file])
    assert [sample.hint.shape for sample in asked] == 2 * [(96, 96, 3)] + 2 * [(64, 64, 3)]
    assert [bool(sample.caption) for sample in asked] == [False, False, True, True]
    assert evaluated(files, "tile", "run") == 2
    assert "not a run of train.py --recipe tile" in capsys.readouterr().err


def lines_of(recipe, sd, files, capsys):
    """Of each line its own figure, then those beside it."""
    evaluate_recipes.report_recipe(sd, recipe, str(files / "other.safetensors"), 2, {})
    lines = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    return [[float(number) for number in re.findall(r"-?[\d.]+|inf", line)] for line in lines]


def test_edits_are_beside_what_another_instruction_makes_and_the_picture_to_change(sd, files, monkeypatch, capsys):
    asked = []

    def paint(samples):
        asked.extend(samples)
        return [sample.image if len(asked) <= 2 else 255 - sample.hint for sample in samples]

    monkeypatch.setattr(evaluate_recipes, "painter", lambda *_: paint)
    pixels, change, elsewhere = lines_of("ip2p", sd, files, capsys)
    own, others = asked[:2], asked[2:]
    assert [one.caption for one in others] == [one.caption for one in own[::-1]]
    assert all(a.hint is b.hint for a, b in zip(own, others, strict=True))
    for painted, another, before, true in (pixels, change):
        assert painted == 1 > max(another, before, true)  # the last two went through the autoencoder
    painted, *beside = elsewhere
    assert painted < 2 < min(beside) and len(set(beside)) == 3


def test_sharpness_has_no_floor_and_the_ceiling_is_the_autoencoders(sd, files, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_recipes, "painter", lambda *_: lambda samples: [sample.image for sample in samples])
    (near, mismatched, true), (sharpness, true_sharpness) = lines_of("tile", sd, files, capsys)
    assert near == np.inf > max(mismatched, true) and sharpness == 1 != true_sharpness


def test_what_cannot_be_measured_is_said_before_anything_is_loaded(capsys):
    base = ["--base", "none.safetensors"]
    assert evaluate.main([*base, "--recipe", "blur", "runs/blur"]) == 2
    assert 'there is no recipe "blur", expected one of tile, ' in capsys.readouterr().err
    for words in (["--control", "fill50k", "control.safetensors"], ["--base-only"]):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*base, "--recipe", "tile", "runs/tile", *words])
        assert f"{words[0]}: not allowed with argument --recipe" in capsys.readouterr().err


def test_a_single_picture_has_no_floor(sd, files, monkeypatch, capsys):
    """It would be measured against itself."""
    monkeypatch.setattr(evaluate_recipes, "painter", lambda *_: lambda samples: [sample.image for sample in samples])
    evaluate_recipes.report_recipe(sd, "tile", str(files / "other.safetensors"), 1, {})
    said = capsys.readouterr().out
    assert "(true pictures" in said and "mismatched" not in said
