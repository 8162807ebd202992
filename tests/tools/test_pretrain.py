"""Pretraining: drawn images, an autoencoder and a UNet, on models small enough for a test."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL, small_sd

from controlnet.common.images import to_images
from controlnet.objective import seeded
from tools import pretrain, pretrain_unet, pretrain_vae
from tools.pretrain_pictures import Pictures, mixture, open_pictures
from tools.pretrain_unet import LatentPairs, drop_prompts, unit_scale

STEPS = ["--vae-steps", "4", "--unet-steps", "4", "--unet-batch", "2", "--pictures", "4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return open_pictures(tmp_path_factory.mktemp("pictures"), SMALL.resolution, 70, seed=0)


@pytest.fixture
def shrunk(monkeypatch):
    monkeypatch.setattr(pretrain, "SMALL", SMALL)
    for module in (pretrain_vae, pretrain_unet):
        monkeypatch.setattr(module, "SAVE_EVERY", 2)
        monkeypatch.setattr(module, "SHOWN", 1)
    monkeypatch.setattr(pretrain_vae, "MEASURED", 1)


def test_pictures_are_the_first_samples_and_are_drawn_once(pictures, tmp_path):
    worlds = mixture(SMALL.resolution, seed=0)
    for i in (0, 1, 63, 64, 69):  # the last two are of a second chunk
        picture = worlds[i % 6].draw(i // 6)
        assert (pictures.images[i] == picture.image).all()
        assert pictures.captions[i] == picture.caption
    first = open_pictures(tmp_path, SMALL.resolution, 2, seed=0)
    again = open_pictures(tmp_path, SMALL.resolution, 2, seed=1)  # which are other samples, if they are drawn
    assert first.captions == again.captions
    with pytest.raises(ValueError, match="holds 2 images, expected 3"):
        open_pictures(tmp_path, SMALL.resolution, 3, seed=0)


def test_pretraining_resumes_where_it_stopped(tmp_path, monkeypatch, shrunk):
    def run(out):
        return pretrain.main(["--out", str(tmp_path / out), *STEPS])

    assert run("whole") == 0
    stopping = pretrain_vae.save_state

    def save_and_stop(path, step, **parts):
        stopping(path, step, **parts)
        raise KeyboardInterrupt

    for module in (pretrain_vae, pretrain_unet):
        monkeypatch.setattr(module, "save_state", save_and_stop)
    for _ in range(4):  # two saves of the autoencoder, two of the UNet
        assert run("parts") == 130
    for module in (pretrain_vae, pretrain_unet):
        monkeypatch.setattr(module, "save_state", stopping)
    assert run("parts") == 0
    whole, parts = (load_file(tmp_path / name / "small.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_finished_base_goes_on_learning_with_the_same_latents(tmp_path, shrunk):
    base = tmp_path / "base.safetensors"
    small_sd().save(base)
    assert pretrain.main(["--start", str(base), "--out", str(tmp_path), *STEPS]) == 0
    before, after = load_file(base), load_file(tmp_path / "small.safetensors")
    changed = {key for key in before if not torch.equal(before[key].half(), after[key])}
    for part in ("model.diffusion_model.", "cond_stage_model."):
        assert any(key.startswith(part) for key in changed)
    assert not any(key.startswith("first_stage_model.") for key in changed)


def test_latents_and_captions_of_the_base_belong_together(pictures, tmp_path):
    sd = small_sd()
    pairs = LatentPairs.of(pictures, sd, tmp_path / "latents.npy")
    latents, captions = pairs.draw(8, seeded(3))
    for latent, caption in zip(latents, captions, strict=True):
        want = sd.encode(to_images([pictures.images[pictures.captions.index(caption)]]), sample=False)[0]
        torch.testing.assert_close(latent, want, rtol=1e-3, atol=1e-4)
    other = Pictures(pictures.images[::-1], pictures.captions)  # whose latents are read, and not computed
    assert torch.equal(LatentPairs.of(other, sd, tmp_path / "latents.npy").latents, pairs.latents)


def test_half_of_the_prompts_are_dropped_and_the_others_stay():
    captions = [f"prompt {i}" for i in range(2000)]
    dropped = drop_prompts(captions, 0.5, seeded(0))
    assert 0.45 < dropped.count("") / 2000 < 0.55
    assert all(new in ("", old) for new, old in zip(dropped, captions, strict=True))
    assert drop_prompts(captions, 0.0, seeded(0)) == captions
    assert not any(drop_prompts(captions, 1.0, seeded(0)))


def test_latents_get_unit_standard_deviation(pictures):
    vae = small_sd().vae
    vae.config = replace(vae.config, scale=unit_scale(vae, pictures))
    assert vae.encode(to_images(pictures.images)).std().item() == pytest.approx(1, rel=1e-3)
