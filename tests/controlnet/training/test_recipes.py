"""What the recipes set, what their hints are, and that infer.py makes the same ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALLEST, small_sd

from controlnet.common.image_files import read_mask
from controlnet.common.images import to_hints
from controlnet.hints import detect
from controlnet.hints.hint_image import HintImage, in_rgb
from controlnet.training.example import example_of, infer_command
from controlnet.training.opening import open_sources
from controlnet.training.options import TrainSettings, fields, parse_args
from controlnet.training.recipes import RECIPES, settings_of
from controlnet.training.resolve import control_config, resolve
from controlnet.training.run_state import RunFolder
from controlnet.training.sources import WorldSource
from controlnet.training.stored_latents import hint_as_image, hint_from_image
from controlnet.worlds import Shapes

SIZE = (64, 64)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    small_sd(SMALLEST).save(path)
    return str(path)


def settings_for(base, out, words):
    return resolve(parse_args("", ["--base", base, "--out", str(out), *words.split()]))


def test_the_help_tells_of_each():
    (option,) = (item for item in fields(TrainSettings) if item.name == "recipe")
    assert all(name in option.metadata["argument"]["help"] for name in RECIPES)


def test_a_recipe_is_a_few_settings_and_what_is_given_comes_first(base, tmp_path):
    shuffle = settings_for(base, tmp_path, "--recipe shuffle")
    assert (shuffle.data, shuffle.detect) == ("scenes", "shuffle:cell=32")  # half of the base's 64 pixels
    assert control_config(shuffle).global_average_pooling
    tile = settings_for(base, tmp_path, "--recipe tile --data shapes --detect tile:factor=4")
    assert (tile.data, tile.detect, tile.prompt_dropout) == ("shapes", "tile:factor=4", 0.5)
    assert not control_config(tile).global_average_pooling
    ip2p = settings_for(base, tmp_path, "--recipe ip2p")
    assert (ip2p.data, ip2p.detect, ip2p.prompt_dropout) == ("edits", None, 0.1)


def test_a_run_goes_on_with_what_its_recipe_set(base, tmp_path):
    first = settings_for(base, tmp_path, "--recipe tile --detect tile:factor=4")
    RunFolder(tmp_path).begin(0, first, {})
    for words in ("", "--recipe tile"):
        assert settings_for(base, tmp_path, f"--resume {words}").detect == "tile:factor=4"
    with pytest.raises(ValueError, match="was started with --recipe tile, not shuffle"):
        settings_for(base, tmp_path, "--resume --recipe shuffle")


@pytest.mark.parametrize(
    "recipe, given, sentence",
    [
        ("tile", {"detect": "canny"}, "the recipe tile says what its hints are, and --detect canny others"),
        ("ip2p", {"detect": "tile"}, "the recipe ip2p says what its hints are"),
        ("ip2p", {"data": "fill50k"}, "before and after a change, and fill50k has none: .* or --data edits"),
    ],
)
def test_what_contradicts_a_recipe_is_refused(recipe, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings_of(recipe, given, 64)


def photographs(folder, count=6):
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((80, 64), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.png")
    return str(folder)


def test_photographs_alone_do_for_all_but_ip2p(tmp_path):
    given = {"data": photographs(tmp_path), "prompt_dropout": 1.0}
    for recipe in ("tile", "shuffle", "inpaint"):
        settings = TrainSettings(recipe=recipe, **given, **settings_of(recipe, given, 64))
        train = open_sources(settings, SIZE).train
        hints = [train.sample(i).hint for i in range(len(train))]
        assert all(hint.shape == (64, 64, 3) for hint in hints)
        assert np.array_equal(hints[2], train.hint(2)) and not np.array_equal(hints[2], hints[3])
    with pytest.raises(ValueError, match="put each picture as it is before the change into hints/"):
        open_sources(TrainSettings(recipe="ip2p", **given), SIZE)


def test_a_synthetic_dataset_with_hints_from_its_images_shares_the_latents_alone():
    own, tile = (WorldSource("shapes", SIZE, 4, detect=name) for name in (None, "tile"))
    sample = tile.sample(2)
    assert np.array_equal(sample.hint, detect("tile", Shapes(64)[2].image))
    assert np.array_equal(sample.hint, tile.hint(2))
    assert sample.caption == own.sample(2).caption
    for key, with_edges in zip(tile.identity().keys, own.identity().keys, strict=True):
        assert key.latents == with_edges.latents and key.hint != with_edges.hint
    assert tile.identity().fingerprint == own.identity().fingerprint | {"detect": "tile"}


@pytest.mark.parametrize(
    "one, other, shared",
    [
        (dict(name="canny"), dict(name="scribble"), True),
        (dict(name="seg"), dict(name="canny"), False),  # whose first picture is the same
        (dict(name="seg"), dict(name="seg", seed=1), False),
        (dict(name="seg"), dict(name="seg", held_out=True), False),
        (dict(name="seg"), dict(name="seg", size=(72, 72)), False),
    ],
)
def test_synthetic_datasets_that_draw_the_same_pictures_share_their_latents_alone(one, other, shared):
    a, b = (WorldSource(**{"size": SIZE, "length": 2, **given}).identity().keys for given in (one, other))
    for key, with_other_hint in zip(a, b, strict=True):
        assert (key.latents == with_other_hint.latents) == shared and key.hint != with_other_hint.hint


def test_a_hole_is_stored_and_read_to_the_bit():
    holed, plain = (WorldSource("shapes", SIZE, 1, detect=name).hint(0) for name in ("inpaint", None))
    stored = hint_from_image(hint_as_image(holed))
    assert holed.min() == -1 and stored.dtype == np.float32 and np.array_equal(stored, holed)
    assert np.array_equal(hint_from_image(hint_as_image(plain)), plain)
    hole, image = (holed < 0).all(axis=2), Shapes(64)[0].image
    assert (in_rgb(holed)[hole] == 0).all() and np.array_equal(in_rgb(holed)[~hole], image[~hole])


@pytest.mark.parametrize("recipe", RECIPES)
def test_infer_makes_the_hints_of_the_training(recipe, tmp_path):
    """From the files and the options of the command that a run ends with."""
    settings = TrainSettings(recipe=recipe, validate=[], **settings_of(recipe, {}, 64))
    sample, run = open_sources(settings, SIZE).validation.sample(1), RunFolder(tmp_path)
    example = example_of(settings, run, sample)
    mask = read_mask(example.mask) if example.mask else None
    hint = HintImage.of(example.file, settings.detect, mask=mask).at(SIZE)
    assert torch.equal(hint, to_hints([sample.hint]))
    command = infer_command(settings, run, example)
    assert ("--mask" in command) == (recipe == "inpaint") and ("--detect" in command) == (recipe != "ip2p")


def test_of_own_photographs_to_inpaint_nobody_knows_the_hole(tmp_path):
    sample = WorldSource("shapes", SIZE, 1, detect="inpaint").sample(0)
    settings = TrainSettings(detect="inpaint", validate=[["photo.png", "a bird"]])
    assert example_of(settings, RunFolder(tmp_path), sample).mask == str(tmp_path / "example-mask.png")
    tiled = replace(settings, detect="tile"), RunFolder(tmp_path), replace(sample, hint=sample.image)
    assert example_of(*tiled).file == "photo.png"


def test_settings_are_kept_as_they_were_preset(base, tmp_path):
    settings = settings_for(base, tmp_path, "--recipe shuffle")
    RunFolder(tmp_path).begin(0, settings, {})
    kept = json.loads((tmp_path / "settings.json").read_text())["settings"]
    assert kept["recipe"] == "shuffle" and kept["global_average_pooling"] and kept["detect"] == "shuffle:cell=32"
