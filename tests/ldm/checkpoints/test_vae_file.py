"""Autoencoders in files of their own: every spelling gives the same numbers, for bases with one and without."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALLEST, assert_same, error_of, small_sd, strengthened
from written import rewrite

from ldm import StableDiffusion
from ldm.checkpoints.recognise import open_base

PREFIX = "first_stage_model."
NORM = f"{PREFIX}decoder.conv_in.bias"


@pytest.fixture(scope="module")
def other():
    """A model with another autoencoder than `small_sd`."""
    torch.manual_seed(7)
    return strengthened(StableDiffusion(SMALLEST)).eval()


@pytest.fixture(scope="module")
def own():
    return small_sd(SMALLEST)


@pytest.fixture(scope="module")
def folder(own, other, tmp_path_factory):
    """Its autoencoder in every spelling, a base whose own is of NaN, and one without."""
    folder = tmp_path_factory.mktemp("vae")
    other.save(folder / "whole.safetensors")
    other.save(folder / "pipeline", layout="diffusers")
    whole = load_file(folder / "whole.safetensors")
    original = {key.removeprefix(PREFIX): value for key, value in whole.items() if key.startswith(PREFIX)}
    theirs = load_file(folder / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(original, folder / "original.safetensors")
    save_file({PREFIX + key: value for key, value in original.items()}, folder / "prefixed.safetensors")
    attention = {key: value.flatten(1) for key, value in original.items() if "attn_1" in key and value.ndim == 4}
    save_file(original | attention, folder / "matrices.safetensors")
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"state_dict": {**original, **loss}, "epoch": 3}, folder / "published.ckpt")
    torch.save({"model": {f"module.{key}": value for key, value in original.items()}}, folder / "trainers.pt")
    save_file(theirs, folder / "diffusers.safetensors")
    save_file({f"vae.{key}": value for key, value in theirs.items()}, folder / "theirs_prefixed.safetensors")
    old = {old_name(key): value for key, value in theirs.items()}
    save_file(old, folder / "old.safetensors")
    convolutions = {
        key: value[..., None, None] for key, value in old.items() if "attentions" in key and value.ndim == 2
    }
    save_file(old | convolutions, folder / "old_convolutions.safetensors")

    own.save(folder / "base.safetensors")
    save_file(
        {key: value for key, value in load_file(folder / "base.safetensors").items() if not key.startswith(PREFIX)},
        folder / "without.safetensors",
        {"config": json.dumps(SMALLEST.to_dict())},
    )
    rewrite(folder / "base.safetensors", lambda tensors: tensors.update({NORM: torch.full((4,), torch.nan)}))
    own.save(folder / "base", layout="diffusers")
    (folder / "base" / "vae").rename(folder / "unused")
    return folder


def old_name(key):
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    return re.sub(r"(?<=attentions\.0\.)(to_[qkv]\.|to_out\.0\.)", lambda match: names[match[1]], key)


SPELLINGS = ["original.safetensors", "prefixed.safetensors", "matrices.safetensors", "published.ckpt", "trainers.pt"]
SPELLINGS += ["diffusers.safetensors", "theirs_prefixed.safetensors", "old.safetensors", "pipeline", "pipeline/vae"]
SPELLINGS += ["whole.safetensors", "old_convolutions.safetensors"]


@pytest.mark.filterwarnings("ignore:.*more than the model reads")
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_the_same_autoencoder(folder, own, other, name):
    sd = StableDiffusion.load(folder / "without.safetensors", vae=folder / name)
    assert_same(sd.vae, other.vae)
    assert_same(sd.unet, own.unet)


@pytest.mark.parametrize("base, name", [("base", "original.safetensors"), ("base.safetensors", "pipeline")])
def test_in_place_of_a_missing_or_broken_one(folder, own, other, tmp_path, base, name, recwarn):
    sd = StableDiffusion.load(folder / base, vae=folder / name)
    assert_same(sd.vae, other.vae)
    assert_same(sd.text_encoder, own.text_encoder)
    assert not recwarn
    sd.save(tmp_path / "again.safetensors")
    assert_same(StableDiffusion.load(tmp_path / "again.safetensors"), sd)


def test_what_a_base_with_none_or_a_broken_one_asks_for(folder):
    assert "it has no autoencoder (or another one)" in error_of(StableDiffusion.load, folder / "without.safetensors")
    for name in ("without.safetensors", "base"):
        assert "give one with --vae FILE" in error_of(StableDiffusion.load, folder / name)
    with pytest.warns(UserWarning, match="decoder.conv_in.bias: expect .* or give another autoencoder with --vae"):
        StableDiffusion.load(folder / "base.safetensors")


def test_what_is_left_out_is_said_with_the_file_it_is_in(folder):
    with pytest.warns(UserWarning, match=r"published.ckpt. has more .*, left out: .*loss.discriminator"):
        StableDiffusion.load(folder / "without.safetensors", vae=folder / "published.ckpt")


def without_a_bias(tensors):
    del tensors["quant_conv.bias"]


def test_what_does_not_fit(folder, tmp_path):
    path = tmp_path / "vae.safetensors"

    def sentence(change):
        rewrite(folder / "original.safetensors", change, path)
        return error_of(open_base, folder / "without.safetensors", vae=path)

    wide = sentence(lambda tensors: tensors.update({"decoder.conv_in.weight": torch.zeros(4, 16, 3, 3)}))
    assert f'"{path}" is an autoencoder with 16 latent channels, expected 4' in wide
    assert "1 key missing (first_stage_model.quant_conv.bias)" in sentence(without_a_bias)
    assert "holds no autoencoder: it is a LoRA" in sentence(lambda tensors: {"lora_unet_x.alpha": torch.zeros(1)})
    assert "does not exist" in error_of(open_base, folder / "without.safetensors", vae=tmp_path / "none")


def test_the_scale_of_another_familys_latents(folder, tmp_path):
    config = replace(SMALLEST, vae=replace(SMALLEST.vae, scale=0.13025))
    StableDiffusion(config).save(tmp_path / "sdxl", layout="diffusers")
    for vae in ("sdxl", "sdxl/vae", "sdxl/vae/diffusion_pytorch_model.safetensors"):
        sentence = error_of(open_base, folder / "without.safetensors", vae=tmp_path / vae)
        assert "for latents scaled by 0.13025, expected 0.18215" in sentence
