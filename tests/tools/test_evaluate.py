"""How pictures of scenes are judged: by a perfect judge first, which sees exactly what is there."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from small import SMALL, small_control, small_sd, strengthened

from controlnet import Control, generate
from controlnet.common.images import to_hints
from controlnet.worlds import Canny, Scenes, Seg
from controlnet.worlds.scenes.captions import inventory
from controlnet.worlds.world import Thing
from tools import evaluate, judge
from tools.evaluate_scenes import best_seen, classes_iou, compared, found, samples_of, things_found, things_iou
from tools.judge import COLOUR_NAMES, Judge, colours_of, load_judge
from tools.paint import after_autoencoder


@pytest.fixture(scope="module")
def samples():
    return samples_of(Scenes(64, held_out=True), 6, scenes=True)


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    assert judge.main(["--out", str(file), "--steps", "2", "--batch", "2", "--size", "32"]) == 0
    return file


def seen_in(truth):
    return truth.classes, colours_of(truth)


def test_what_is_there_is_found_in_its_colour_and_place(samples):
    for sample in samples:
        for thing in sample.truth.things:
            assert found(seen_in(sample.truth), thing) == (True, True, True)
            other = COLOUR_NAMES[COLOUR_NAMES.index(thing.colour) - 1]
            assert found(seen_in(sample.truth), replace(thing, colour=other)) == (True, False, False)
            other = {"left": "middle", "middle": "right", "right": "left"}[thing.place]
            assert found(seen_in(sample.truth), replace(thing, place=other)) == (True, True, False)
        missing = {"house", "castle", "cat", "dog", "car"} - {thing.kind for thing in sample.truth.things}
        assert found(seen_in(sample.truth), Thing(missing.pop(), "red", "small", "left")) == (False, False, False)


def test_perfect_pictures_have_no_error_and_others_have(samples):
    truths = [sample.truth for sample in samples]
    seen = [seen_in(truth) for truth in truths]
    assert all(
        things_iou(one, truth) == classes_iou(one, truth) == (1.0,) for one, truth in zip(seen, truths, strict=True)
    )
    (line,) = compared(things_iou, seen, seen, truths)
    assert line.startswith("1.000 (mismatched 0.") and line.endswith("autoencoder 1.000)")
    shifted = [tuple(np.roll(part, 8, axis=1) for part in one) for one in seen]
    assert all(0.1 < things_iou(one, truth)[0] < 0.9 for one, truth in zip(shifted, truths, strict=True))
    assert things_found(seen[0], truths[0].things) == (1, 1, 1)


def test_the_ceiling_is_what_the_autoencoder_leaves_of_true_pictures(samples):
    sd, image = small_sd(), samples[0].image
    (seen,) = best_seen(sd, SimpleNamespace(see=lambda picture: picture), samples[:1])
    assert np.array_equal(seen, after_autoencoder(sd, [image])[0]) and not np.array_equal(seen, image)


def test_prompts_name_all_things():
    things = (Thing("house", "red", "large", "left"), Thing("person", "orange", "small", "middle"))
    assert inventory(things) == "a red house on the left and a person in orange in the middle"


def test_only_scenes_are_judged_and_only_figures_measured():
    scenes, figures = (samples_of(Canny(32, held_out=True), 3, scenes) for scenes in (True, False))
    assert len(scenes) == len(figures) == 3
    assert all(sample.truth.things for sample in scenes) and not any(sample.truth for sample in figures)


def test_a_judge_is_what_was_trained(judge_file, samples, tmp_path):
    one = load_judge(judge_file)
    classes, colours = one.see(samples[0].image)
    assert classes.shape == colours.shape == (64, 64) and classes.max() < 31 and colours.max() < 12
    assert not one.training and not torch.equal(one.out.weight, Judge().out.weight)
    for name, content in (("none", None), ("damaged", judge_file.read_bytes()[:-9]), ("older", save({"x": classes}))):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is .*: train it with python -m tools.judge"):
            load_judge(tmp_path / name)


@pytest.mark.parametrize("option", ["--steps=0", "--batch=0", "--size=0", "--size=100"])
def test_a_judge_that_would_learn_nothing_replaces_none(tmp_path, option):
    (tmp_path / "judge.safetensors").write_text("a judge")
    with pytest.raises(SystemExit) as stop:
        sys.exit(judge.main(["--out", str(tmp_path / "judge.safetensors"), "--size", "32", "--steps", "1", option]))
    assert stop.value.code == 2 and (tmp_path / "judge.safetensors").read_text() == "a judge"


def test_scenes_are_measured_with_and_without_a_control(judge_file, tmp_path, monkeypatch, capsys):
    sd = small_sd()
    sd.save(tmp_path / "base.safetensors")
    small_control(sd).save(tmp_path / "seg.safetensors")
    monkeypatch.setattr(evaluate, "JUDGE", judge_file)
    monkeypatch.setattr(evaluate, "load_judge", lambda: load_judge(judge_file))
    arguments = ["--base", str(tmp_path / "base.safetensors"), "--control", Seg.name, str(tmp_path / "seg.safetensors")]
    assert evaluate.main([*arguments, "--count", "2", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "things named in a scene's prompt: there in any colour" in out
    for prompts in ("prompts that name all", "no prompt"):
        assert f"control, seg with {prompts}: mean IoU of things" in out


def largest_difference(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


def test_two_controls_at_once_get_each_its_hint(judge_file, tmp_path, monkeypatch, capsys):
    sd = small_sd()
    pose, strokes = small_control(sd), strengthened(small_control(sd))
    sample = evaluate.PoseAndScribble(SMALL.resolution, held_out=True)[0]
    hints = [to_hints([sample.hint[..., :3]]), to_hints([sample.hint[..., 3:]])]
    (wanted,) = generate(sd, sample.caption, list(map(Control, (pose, strokes), hints)), seed=0, steps=1)
    (made,) = evaluate.painter(sd, [pose, strokes], dict(steps=1))([sample])
    (other,) = evaluate.painter(sd, [strokes, pose], dict(steps=1))([sample])
    assert largest_difference(made, wanted) <= 1 < largest_difference(other, wanted)

    for part in (sd, pose, strokes):
        part.save(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors")
    base, *files = map(str, sorted(tmp_path.iterdir()))
    monkeypatch.setattr(evaluate, "load_judge", lambda: load_judge(judge_file))
    controls = [
        word for name, file in zip(("people", "scribble"), files, strict=True) for word in ("--control", name, file)
    ]
    assert evaluate.main(["--base", base, *controls, "--count", "1", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "control, pose with scribble with prompt: mean IoU" in out
    assert "control, scribble with no prompt: mean IoU of things" in out, "of the scenes among its pictures"
    assert "control, scribble without: mean IoU 0." in out, "of the others"


def test_without_a_judge_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    small_sd().save(tmp_path / "base.safetensors")
    monkeypatch.setattr(evaluate, "JUDGE", tmp_path / "judge.safetensors")
    monkeypatch.setattr(evaluate, "load_judge", lambda: load_judge(tmp_path / "judge.safetensors"))
    base = ["--base", str(tmp_path / "base.safetensors"), "--count", "1", "--steps", "1"]
    assert evaluate.main([*base, "--base-only"]) == 0
    said = capsys.readouterr()
    assert "python -m tools.judge" in said.err and "22 basic colours" in said.out and "scene's prompt" not in said.out
    assert evaluate.main([*base, "--control", Seg.name, "control.safetensors"]) == 2
    assert "judge.safetensors is missing" in capsys.readouterr().err


def test_each_picture_of_a_batch_has_noise_of_its_own():
    sd, world = small_sd(), evaluate.People(SMALL.resolution, held_out=True)
    pose, samples, settings = small_control(sd), [world[0], world[1]], dict(steps=2, eta=1.0)
    for seed, (made, sample) in enumerate(zip(evaluate.painter(sd, [pose], settings)(samples), samples, strict=True)):
        (wanted,) = generate(sd, sample.caption, [Control(pose, to_hints([sample.hint]))], seed=seed, **settings)
        (other,) = generate(sd, sample.caption, [Control(pose, to_hints([sample.hint]))], seed=seed, steps=2)
        assert largest_difference(made, wanted) <= 1 < largest_difference(other, wanted)


def test_without_a_prompt_guidance_strengthens_the_hint():
    sd = small_sd()
    pose, sample = small_control(sd), evaluate.People(SMALL.resolution, held_out=True)[0]
    settings = dict(steps=1, cfg=4.0)
    for caption, mode in (("", "prompt"), ("a cat", "balanced")):
        (made,) = evaluate.painter(sd, [pose], settings)([replace(sample, caption=caption)])
        control = Control.in_mode(pose, to_hints([sample.hint]), mode)
        (wanted,) = generate(sd, caption, [control], seed=0, **settings)
        assert largest_difference(made, wanted) <= 1


def test_a_single_picture_has_no_floor(samples, capsys):
    """It would be its own figure."""
    truth = samples[0].truth
    assert compared(things_iou, [seen_in(truth)], [seen_in(truth)], [truth]) == ["1.000 (autoencoder 1.000)"]
    evaluate.report_control(evaluate.People(64), lambda asked: [sample.image for sample in asked], 1)
    said = capsys.readouterr().out
    assert "mean IoU" in said and "pixels away" in said and "(" not in said
