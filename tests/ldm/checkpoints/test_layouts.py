"""Layouts in which models are published: each loads to the same numbers, or says what is wrong with it."""

import argparse
import copy
import json
import re
import zipfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALLEST, assert_same, error_of, small_control, small_sd
from written import rewrite, without_metadata

from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.diffusers import WEIGHTS_NAME
from ldm.checkpoints.folders import read_folder
from ldm.checkpoints.key_maps import base_maps
from ldm.checkpoints.load import load_parts
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.recognise import identify
from tools.description import contents, facts_of


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


@pytest.fixture(scope="module")
def control(sd):
    return small_control(sd)


@pytest.fixture
def base(sd, tmp_path):
    """The path of a base in the original layout."""
    sd.save(tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def folder(sd, tmp_path):
    """The path of a base in diffusers' layout."""
    sd.save(tmp_path / "folder", layout="diffusers")
    return tmp_path / "folder"


# --------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize(
    "dtype, wrapped, new",
    [(torch.float16, True, True), (torch.float32, False, True), (torch.bfloat16, False, False)],
    ids=["zip, wrapped", "zip", "legacy"],
)
def test_pickles(sd, control, tmp_path, dtype, wrapped, new):
    control.save(tmp_path / "control.safetensors", dtype)
    tensors = load_file(tmp_path / "control.safetensors")
    values = {"state_dict": tensors, "epoch": 3, "optimizer_states": [{"state": {0: torch.ones(3)}}]}
    torch.save(values if wrapped else tensors, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
    assert_same(ControlNet.load(tmp_path / "c.pth", sd.unet), copy.deepcopy(control).to(dtype).float())


def test_pickled_tensors_may_be_views_and_parameters(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    values = {"turned": whole.t(), "part": whole[1:3, 2:], "one": torch.tensor(3.0), "none": torch.zeros(0, 3)}
    values["parameter"] = torch.nn.Parameter(whole)
    torch.save(values, tmp_path / "file.ckpt")
    tensors = open_checkpoint(tmp_path / "file.ckpt").tensors
    assert tensors.keys() == values.keys()
    assert all(torch.equal(tensors[key].view(), value) for key, value in values.items())


def rewrite_pickle(path, change):
    """The instructions of a zip archive changed, as `change` has it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    records[name] = change(records[name])
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records.items():
            archive.writestr(record, data)


@pytest.mark.parametrize(
    "name", ["pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint", "omegaconf.dictconfig DictConfig"]
)
def test_what_trainers_leave_beside_the_weights_is_dropped(tmp_path, name):
    """The published SD 1.4 names a callback of Lightning's; it need not be installed to read the weights."""
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "file.ckpt")
    leftover = b"c" + name.replace(" ", "\n").encode() + b"\n"
    built = b")\x81}X\x01\x00\x00\x00bK\x00sb"  # an object of it, with the attribute b
    extra = b"X\x09\x00\x00\x00callbacks}" + leftover + leftover + built + b"ss."
    rewrite_pickle(tmp_path / "file.ckpt", lambda program: program[:-1] + extra)
    assert torch.equal(open_checkpoint(tmp_path / "file.ckpt").tensors["a"].view(), torch.ones(2))


def test_a_long_list_hides_no_tensors(tmp_path):
    torch.save({"losses": [0.5] * 20_000, "model": {"a": torch.ones(2)}}, tmp_path / "file.ckpt")
    assert open_checkpoint(tmp_path / "file.ckpt").keys == {"model.a"}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_plain_python_and_numpy_beside_the_weights_are_dropped(tmp_path, new):
    values = {
        "state_dict": {"a": torch.ones(2)},
        "args": argparse.Namespace(lr=1e-4),
        "path": Path("here"),
        "counts": defaultdict(list, {"a": [1]}),
        "types": [int, dict],
        "loss": np.float64(0.5),
        "array": np.arange(3),
        "set": {1, 2},
    }
    torch.save(values, tmp_path / "file.ckpt", _use_new_zipfile_serialization=new)
    known = set(torch.serialization.get_safe_globals())
    assert torch.equal(open_checkpoint(tmp_path / "file.ckpt").tensors["a"].view(), torch.ones(2))
    assert set(torch.serialization.get_safe_globals()) == known  # what stands in for them does so here alone


def test_other_tensors_than_plain_ones_are_dropped(tmp_path):
    torch.save({"plain": torch.ones(2), "meta": torch.ones(2, device="meta")}, tmp_path / "file.ckpt")
    assert list(open_checkpoint(tmp_path / "file.ckpt").tensors) == ["plain"]
    torch.save({"sparse": torch.eye(2).to_sparse()}, tmp_path / "file.ckpt")  # checking one can take for ever
    assert "asks for 'torch._utils._rebuild_sparse_tensor'" in error_of(open_checkpoint, tmp_path / "file.ckpt")


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.safetensors", bytes(1000))
    message = error_of(open_checkpoint, tmp_path / "model.zip")
    assert "is a zip archive that PyTorch did not write: unpack it" in message and "damaged" not in message


def test_archives_that_pytorch_would_trust_too_much(tmp_path, monkeypatch):
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr("ldm.checkpoints.pickles.LARGEST_PROGRAM", 50)
    assert "its pickle has" in error_of(open_checkpoint, path)
    monkeypatch.undo()
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for record, data in records.items():
            archive.writestr(record, data)
    assert "is compressed or encrypted: save it again with torch.save" in error_of(open_checkpoint, path)


# ------------------------------------------------------------------------------------------------- base: one file


def test_the_moving_average_is_a_choice(sd, base):
    def change(tensors):
        for key in list(tensors):
            if key.startswith("model."):
                tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors[key] + 1
        tensors["model_ema.decay"] = torch.tensor(0.9999)

    rewrite(base, change)
    assert_same(StableDiffusion.load(base), sd)
    averaged = StableDiffusion.load(base, ema=True)
    assert torch.equal(averaged.unet.decoder.conv_out.bias, sd.unet.decoder.conv_out.bias + 1)
    assert_same(averaged.vae, sd.vae)
    assert facts_of(str(base), values=False, keys=False)["EMA"]
    sd.save(base)
    assert "no (complete) moving average" in error_of(StableDiffusion.load, base, ema=True)


def test_unused_layers_of_sd2_may_be_missing(tmp_path):
    """Files that went through diffusers lack them. Zeros stand in: the prompt's states are the same."""

    config = replace(SMALLEST, text=replace(SMALLEST.text, family="open_clip", layers=2))
    model = StableDiffusion(config)
    model.save(tmp_path / "base.safetensors")
    rewrite(
        tmp_path / "base.safetensors",
        lambda tensors: {k: v for k, v in tensors.items() if not re.search(r"resblocks\.1\.|projection|logit", k)},
    )
    model.save(tmp_path / "folder", layout="diffusers")
    with torch.no_grad():
        for path in (tmp_path / "base.safetensors", tmp_path / "folder"):
            again = StableDiffusion.load(path)
            assert torch.equal(again.encode_text(["a dog"]), model.encode_text(["a dog"]))
            assert not again.text_encoder.blocks[1].mlp.expand.weight.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(base, value):
    key = "first_stage_model.decoder.conv_out.bias"
    rewrite(base, lambda tensors: tensors[key].__setitem__(1, value))
    with pytest.warns(UserWarning, match=f"NaN or infinite numbers in 1 tensor, the first in {key}"):
        StableDiffusion.load(base)


# ------------------------------------------------------------------------------------------------- base: a folder


def test_folders_say_what_they_are(sd, folder):
    assert StableDiffusion.load(folder).config == SMALLEST  # by our metadata
    # Our 1x1 convolutions of the autoencoder's attention are linear layers there.
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert vae["encoder.mid_block.attentions.0.to_q.weight"].shape == (SMALLEST.vae.widths[-1],) * 2
    without_metadata(folder / "unet" / WEIGHTS_NAME)
    found = identify(open_checkpoint(folder))
    assert found.config.unet == SMALLEST.unet and found.config.schedule == SMALLEST.schedule
    assert found.prediction_source == "the scheduler's configuration"
    assert_same(StableDiffusion.load(folder), sd)
    assert identify(open_checkpoint(folder), "x0").config.schedule.prediction == "x0"


def test_variants_shards_and_pickles(sd, folder):
    unet, vae, text = (folder / name for name in ("unet", "vae", "text_encoder"))
    weights = unet / "diffusion_pytorch_model.safetensors"
    tensors, names = load_file(weights), ("a.safetensors", "b.safetensors")
    places = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: value for key, value in tensors.items() if places[key] == name}, unet / name)
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.warns(UserWarning, match="both diffusion_pytorch_model.safetensors and .*: the former is read"):
        read_folder(unet)
    weights.unlink()
    (vae / weights.name).rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(load_file(text / "model.safetensors"), text / "pytorch_model.bin")
    (text / "model.safetensors").unlink()
    assert_same(StableDiffusion.load(folder), sd)

    outside = {"weight_map": {"a": "../unet/a.safetensors"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(outside))
    assert "does not say which tensor is in which file" in error_of(StableDiffusion.load, folder)


def test_tokens_that_were_added_to_a_small_vocabulary(sd, folder):
    """As transformers' `resize_token_embeddings` adds them; start and end keep their places."""
    key = "text_model.embeddings.token_embedding.weight"
    rewrite(
        folder / "text_encoder" / "model.safetensors",
        lambda tensors: tensors.update({key: torch.cat([tensors[key], torch.ones(2, SMALLEST.text.width)])}),
    )
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": SMALLEST.text.vocabulary + 2}))
    without_metadata(folder / "unet" / WEIGHTS_NAME)
    with pytest.warns(UserWarning, match=re.escape(f"left out: text_encoder.{key}[600:]")):
        again = StableDiffusion.load(folder)
    assert again.config.text == SMALLEST.text
    assert torch.equal(again.encode_text(["a dog"]), sd.encode_text(["a dog"]))


def test_folders_that_lack_something(folder, tmp_path):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "vae.safetensors")
    assert "holds no weights" in error_of(StableDiffusion.load, folder)
    (folder / "vae" / "config.json").unlink()
    (folder / "vae").rmdir()
    assert "has no vae/, expected unet/, vae/ and text_encoder/" in error_of(StableDiffusion.load, folder)
    assert "a UNet in diffusers' layout: give the folder" in error_of(StableDiffusion.load, folder / "unet")
    assert "an autoencoder alone" in error_of(StableDiffusion.load, tmp_path / "vae.safetensors")
    (tmp_path / "empty").mkdir()
    assert "is a folder without unet/" in error_of(StableDiffusion.load, tmp_path / "empty")
    assert "give one of its files (vae.safetensors)" in error_of(StableDiffusion.load, tmp_path)
    (tmp_path / "models--x" / "snapshots" / "0123").mkdir(parents=True)
    assert "give one of the folders in its snapshots/" in error_of(StableDiffusion.load, tmp_path / "models--x")


@pytest.mark.parametrize(
    "values, what",
    [
        ({"params_ema": {"conv_first.weight": 0}}, "an upscaler of finished images (ESRGAN)"),
        ({320: [{"linear.0.weight": 0}], "name": "x"}, "a hypernetwork"),
        ({"image_proj": {"proj.weight": 0}, "ip_adapter": {"1.to_k_ip.weight": 0}}, "an IP-Adapter"),
        (
            {"a": {"input_hint_block.0.weight": 0}, "b": {"input_hint_block.0.weight": 0}},
            "a file with the tensors of several models",
        ),
        ({"step": 3, "control": {"encoder.blocks.0.weight": 0}}, "the state of a training run, which has a ControlNet"),
        ({"state": {0: {"exp_avg": 0}}, "param_groups": []}, "the state of an optimizer"),
        ({"a": {"b": {"c": 1}}}, "a file without tensors"),
    ],
)
def test_pickles_whose_tensors_are_deeper(tmp_path, values, what):
    def filled(part):
        if isinstance(part, dict):
            return {name: torch.zeros(2) if value == 0 else filled(value) for name, value in part.items()}
        return [filled(value) for value in part] if isinstance(part, list) else part

    torch.save(filled(values), tmp_path / "file.pt")
    assert f"it is {what}" in error_of(StableDiffusion.load, tmp_path / "file.pt")
    assert what in contents(open_checkpoint(tmp_path / "file.pt")).kind


def test_plain_data_beside_the_weights_is_harmless(tmp_path):
    plain = {"dtype": torch.float16, "sizes": torch.Size([1, 2]), "device": torch.device("cpu"), "loss": 0.5, 3: {1, 2}}
    torch.save({"state_dict": {"a": torch.ones(2)}, **plain}, tmp_path / "file.ckpt")
    assert list(open_checkpoint(tmp_path / "file.ckpt").tensors) == ["a"]
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "file.ckpt", pickle_protocol=4)
    assert "save its state_dict with torch.save" in error_of(open_checkpoint, tmp_path / "file.ckpt")


def test_a_folder_is_never_half_there_and_never_overwritten(sd, folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="exists: give the name of a new folder"):
        sd.save(folder, layout="diffusers")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("ldm.checkpoints.diffusers.write_tokenizer", fail)
    with pytest.raises(OSError, match="no space left"):
        sd.save(tmp_path / "new", layout="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_part_alone_fills_a_part(sd, folder):
    """What `load_parts` offers to programs that put a model together: one component's file, one module."""
    from ldm.vae import AutoencoderKL

    vae = AutoencoderKL(SMALLEST.vae)
    load_parts(open_checkpoint(folder), [(vae, base_maps(SMALLEST, "diffusers")[1])], ("unet.", "text_encoder."))
    assert_same(vae, sd.vae)
