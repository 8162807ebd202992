"""Pretraining: drawn images, an autoencoder and a UNet, on models small enough for a test."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import SMALLEST, small_sd
from tape import record_on_tapes
from torch.utils.data import DataLoader

from controlnet.common.graphs import recorded
from controlnet.common.images import to_images
from controlnet.inference.generate import generate
from controlnet.training import step
from tools import pretrain, pretrain_common, pretrain_pictures, pretrain_unet, pretrain_vae
from tools.pretrain_pictures import Pictures, mixture, open_pictures
from tools.pretrain_unet import Batches, latents_of, unit_scale

STEPS = ["--vae-steps", "4", "--unet-steps", "4", "--unet-batch", "2", "--pictures", "4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return open_pictures(tmp_path_factory.mktemp("pictures"), SMALLEST.resolution, 70, seed=0)


@pytest.fixture
def shrunk(monkeypatch):
    """Few pictures of a small base, drawn in this process, and samples in one step."""
    monkeypatch.setattr(pretrain, "TINY", SMALLEST)
    monkeypatch.setattr(pretrain_common, "SAVE_EVERY", "2")
    monkeypatch.setattr(pretrain_pictures, "DataLoader", lambda *given, num_workers, **how: DataLoader(*given, **how))
    monkeypatch.setattr(pretrain_unet, "generate", lambda *given, **how: generate(*given, **{**how, "steps": 1}))
    for module in (pretrain_vae, pretrain_unet):
        monkeypatch.setattr(module, "SHOWN", 1)
    monkeypatch.setattr(pretrain_vae, "MEASURED", 1)


def test_pictures_are_the_first_samples_and_are_drawn_once(pictures, tmp_path):
    worlds = mixture(SMALLEST.resolution, seed=0)
    for i in (0, 1, 6, 69):
        picture = worlds[i % 6].draw(i // 6)
        assert (pictures.images[i] == picture.image).all()
        assert pictures.captions[i] == picture.caption
    first = open_pictures(tmp_path, SMALLEST.resolution, 2, seed=0)
    again = open_pictures(tmp_path, SMALLEST.resolution, 2, seed=1)  # which are other samples, if they are drawn
    assert first.captions == again.captions
    with pytest.raises(ValueError, match="holds 2 images, expected 3"):
        open_pictures(tmp_path, SMALLEST.resolution, 3, seed=0)


def test_pretraining_resumes_where_it_stopped(tmp_path, monkeypatch, shrunk):
    def run(out):
        return pretrain.main(["--out", str(tmp_path / out), *STEPS])

    assert run("whole") == 0
    saving = pretrain_common.write_state

    def save_and_stop(path, state):
        saving(path, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_common, "write_state", save_and_stop)
    assert [run("parts") for _ in range(3)] == [130, 130, 0]  # amid the autoencoder's steps, and amid the UNet's
    whole, parts = (load_file(tmp_path / name / "tiny.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_recorded_steps_train_what_computed_ones_do(tmp_path, monkeypatch, shrunk):
    """Of two shapes of crops that come later and of the UNet: each is computed once and then replayed."""
    steps = ["--vae-steps", "10", "--unet-steps", "4", "--unet-batch", "2", "--vae-batch", "1", "--pictures", "4"]
    assert pretrain.main(["--out", str(tmp_path / "computed"), *steps]) == 0
    tapes = record_on_tapes(monkeypatch)
    monkeypatch.setattr(step, "recorded", lambda compute, _: recorded(compute, torch.device("cuda")))
    assert pretrain.main(["--out", str(tmp_path / "recorded"), *steps]) == 0
    assert [tape.replays for tape in tapes] == [1, 2, 4, 3]
    computed, replayed = (load_file(tmp_path / name / "tiny.safetensors") for name in ("computed", "recorded"))
    assert all(torch.equal(computed[key], replayed[key]) for key in computed)


def test_a_finished_base_goes_on_learning_with_the_same_latents(tmp_path, shrunk):
    base = tmp_path / "base.safetensors"
    small_sd(SMALLEST).save(base)
    assert pretrain.main(["--start", str(base), "--out", str(tmp_path), *STEPS]) == 0
    before, after = load_file(base), load_file(tmp_path / "tiny.safetensors")
    changed = {key for key in before if not torch.equal(before[key].half(), after[key])}
    for part in ("model.diffusion_model.", "cond_stage_model."):
        assert any(key.startswith(part) for key in changed)
    assert not any(key.startswith("first_stage_model.") for key in changed)


def test_a_folder_goes_on_with_what_it_was_begun_with_alone(tmp_path, shrunk, capsys):
    """Anything else would be mixed with the pictures, latents and states that are kept there."""
    base, out = tmp_path / "base.safetensors", ["--out", str(tmp_path / "run"), *STEPS, "--unet-steps", "1"]
    small_sd(SMALLEST).save(base)
    assert pretrain.main(["--start", str(tmp_path / "no base"), *out]) == 2  # which begins nothing
    assert pretrain.main(["--start", str(base), *out]) == 0
    capsys.readouterr()
    for others, words in (
        (["--start", str(base), "--seed", "1"], "(seed: 1 where 0 was)"),
        ([], f"(start: scratch where {base} was)"),
        (["--start", str(base), "--pictures", "3"], "holds 4 images, expected 3"),
    ):
        assert pretrain.main([*out, *others]) == 2
        assert words in capsys.readouterr().err
    assert pretrain.main(["--start", str(base), *out]) == 0


def batches_of(pictures, sd, folder, batch):
    return Batches(latents_of(pictures, sd, folder / "latents.npy"), pictures.captions, sd, batch, steps=4, seed=0)


def test_latents_and_captions_of_the_base_belong_together(pictures, tmp_path):
    sd = small_sd(SMALLEST)
    latents, noise, t, ids = batches_of(pictures, sd, tmp_path, 32)[3]
    known = {tuple(row.tolist()): i for i, row in enumerate(sd.tokenizer(pictures.captions))}
    with_prompt = [i for i, row in enumerate(ids) if not torch.equal(row, sd.tokenizer([""])[0])]
    assert 24 <= len(with_prompt) < 32
    for i in with_prompt[:8]:
        want = sd.encode(to_images([np.array(pictures.images[known[tuple(ids[i].tolist())]])]), sample=False)[0]
        torch.testing.assert_close(latents[i], want, rtol=1e-3, atol=1e-4)
    assert noise.shape == latents.shape and t.shape == (32,)
    other = Pictures(pictures.images[::-1], pictures.captions)  # whose latents are read, and not computed
    assert torch.equal(batches_of(other, sd, tmp_path, 32)[3][0], latents)


def test_a_tenth_of_the_prompts_is_dropped(pictures, tmp_path):
    ids = batches_of(pictures, sd := small_sd(SMALLEST), tmp_path, 2000)[0][3]
    assert 0.07 < (ids == sd.tokenizer([""])).all(dim=1).float().mean() < 0.13


def test_latents_get_unit_standard_deviation(pictures):
    vae = small_sd(SMALLEST).vae
    vae.config = replace(vae.config, scale=unit_scale(vae, pictures))
    assert vae.encode(to_images(np.array(pictures.images))).std().item() == pytest.approx(1, rel=1e-3)
