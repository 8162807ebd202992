"""The programs in tools/ run, on models small enough for a test."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import SMALL, small_control, small_sd

from controlnet.worlds import TINY_CONTROL_OF, WORLDS
from controlnet.worlds.colours import BASIC_COLOURS
from tools import convergence, evaluate, pretrain, strip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sd = small_sd()
    sd.save(folder / "tiny.safetensors")
    for name in TINY_CONTROL_OF.values():
        small_control(sd).save(folder / f"{name}.safetensors")
    return folder


def test_evaluate_prints_every_measure_with_its_floor(models, capsys):
    base, control, pose = (str(models / f"{name}.safetensors") for name in ("tiny", "tiny-fill50k", "tiny-pose"))
    controls = ["--control", "fill50k", control, "--control", "people", pose]
    assert evaluate.main(["--base", base, *controls, "--count", "2", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("average pooling", "22 basic colours", "all colours", "mismatched", "key points"):
        assert words in out
    for line in ("fill50k with prompt", "fill50k without", "people with prompt", "people without"):
        assert f"control, {line}: mean IoU" in out


def test_evaluate_says_what_is_missing(tmp_path, capsys):
    assert evaluate.main(["--base", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err


def test_evaluate_knows_its_worlds(capsys):
    assert evaluate.main(["--control", "moon", "control.safetensors"]) == 2
    assert 'there is no dataset "moon"' in capsys.readouterr().err


def test_the_strip_shows_hints_above_images_for_each_control(models, tmp_path):
    path = tmp_path / "strip.png"
    assert strip.main(["--weights", str(models), "--columns", "1", "--out", str(path)]) == 0
    side = SMALL.resolution
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (2 * side + strip.CAPTION, 3 * side, 3)
    for i, name in enumerate(TINY_CONTROL_OF):
        hint = WORLDS[name](side, colours=BASIC_COLOURS, held_out=True)[0].hint
        assert np.array_equal(pixels[:side, i * side : (i + 1) * side], hint)


def test_the_convergence_strip_has_a_column_for_each_step_between_hints_and_truths(tmp_path):
    side, run, out = 32, tmp_path / "run", tmp_path / "strip.png"
    (run / "samples").mkdir(parents=True)
    for step in (5, 10, 100, 15):  # a row of a grid: hint, sample, truth, text; the value tells which
        rows = [
            np.hstack([np.full((side, side, 3), 10 * row + x + step, np.uint8) for x in range(4)]) for row in (1, 2)
        ]
        Image.fromarray(np.vstack(rows)).save(run / "samples" / f"{step:06d}.png")
    (run / "log.jsonl").write_text('{"step": 5, "iou": 0.25}\n{"step": 6}\n')
    assert convergence.main([str(run), "--rows", "2", "--columns", "3", "--out", str(out)]) == 0
    pixels = np.asarray(Image.open(out))[convergence.CAPTION :: side, ::side, 0]
    # three of the steps 5, 10, 15 and 100, the samples' value being 10 row + 1 + step, between step 5's 0 and 2
    assert pixels.tolist() == [[15, 16, 26, 111, 17], [25, 26, 36, 121, 27]]


def test_a_folder_without_grids_is_no_run(tmp_path, capsys):
    assert convergence.main([str(tmp_path)]) == 2
    assert "has no grids" in capsys.readouterr().err


def shrink(monkeypatch):
    for name, value in dict(TINY=SMALL, SAVE_EVERY=2, MEASURED=1, SHOWN=1).items():
        monkeypatch.setattr(pretrain, name, value)


def test_pretraining_resumes_where_it_stopped(tmp_path, monkeypatch):
    shrink(monkeypatch)
    steps = ["--vae-steps", "4", "--unet-steps", "4", "--unet-batch", "2", "--pictures", "4"]

    def run(out):
        return pretrain.main(["--out", str(tmp_path / out), *steps])

    assert run("whole") == 0
    stopping = pretrain.save_state

    def save_and_stop(path, step, **parts):
        stopping(path, step, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "save_state", save_and_stop)
    for _ in range(4):  # two saves of the autoencoder, two of the UNet
        assert run("parts") == 130
    monkeypatch.setattr(pretrain, "save_state", stopping)
    assert run("parts") == 0
    whole, parts = (load_file(tmp_path / name / "tiny.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_finished_base_goes_on_learning_with_the_same_latents(models, tmp_path, monkeypatch):
    shrink(monkeypatch)
    base = models / "tiny.safetensors"
    steps = ["--unet-steps", "1", "--unet-batch", "2", "--pictures", "4"]
    assert pretrain.main(["--start", str(base), "--out", str(tmp_path), *steps]) == 0
    before, after = load_file(base), load_file(tmp_path / "tiny.safetensors")
    changed = {key for key in before if not torch.equal(before[key].half(), after[key])}
    for part in ("model.diffusion_model.", "cond_stage_model."):
        assert any(key.startswith(part) for key in changed)
    assert not any(key.startswith("first_stage_model.") for key in changed)


def test_latents_and_captions_of_the_base_belong_together():
    sd, world = small_sd(), pretrain.Fill50k(SMALL.resolution)
    pairs = pretrain.LatentPairs(world, 5, sd, chunk=2)
    assert pairs.captions == [world[i].caption for i in range(5)]
    want = sd.encode(pretrain.to_images([world[4].image, world[0].image]), sample=False)
    torch.testing.assert_close(pairs.latents[[4, 0]], want, rtol=1e-3, atol=1e-4)


def test_half_of_the_prompts_are_dropped_and_the_others_stay():
    captions = [f"prompt {i}" for i in range(2000)]
    dropped = pretrain.drop_prompts(captions, 0.5, pretrain.seeded(0))
    assert 0.45 < dropped.count("") / 2000 < 0.55
    assert all(new in ("", old) for new, old in zip(dropped, captions, strict=True))
    assert pretrain.drop_prompts(captions, 0.0, pretrain.seeded(0)) == captions
    assert not any(pretrain.drop_prompts(captions, 1.0, pretrain.seeded(0)))


def test_latents_get_unit_standard_deviation():
    vae = small_sd().vae
    world = pretrain.Fill50k(SMALL.resolution)
    vae.config = replace(vae.config, scale=pretrain.unit_scale(vae, world))
    latents = vae.encode(pretrain.to_images(world[i].image for i in range(256)))
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
