"""Which file of a folder is read: variants of diffusers' folders, and what trainers save in between."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from small import SMALLEST, assert_same, small_control, small_sd

from controlnet.checkpoint import find_control
from controlnet.model import ControlNet
from ldm.checkpoints.folders import weight_file
from ldm.config import UNetConfig

STEM = "diffusion_pytorch_model"
INDEX, OTHER_INDEX = f"{STEM}.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sd = small_sd(SMALLEST)
    small_control(sd).save(folder / "control", layout="diffusers")
    small_control(sd).save(folder / "control.safetensors")
    return folder


# what is there -> what is read
PREFERENCES = [
    ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"], f"{STEM}.safetensors"),
    ([f"{STEM}.bf16.safetensors"], f"{STEM}.bf16.safetensors"),
    ([f"{STEM}.fp16.safetensors", f"{STEM}.non_ema.safetensors"], f"{STEM}.non_ema.safetensors"),
    ([f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"], f"{STEM}.bf16.safetensors"),
    ([f"{STEM}.mine.safetensors"], f"{STEM}.mine.safetensors"),
    ([f"{STEM}.bin", f"{STEM}.fp16.safetensors"], f"{STEM}.fp16.safetensors"),
    (["model.safetensors", "optimizer.bin", "scheduler.bin"], "model.safetensors"),
    (["pytorch_model.bin", "optimizer.bin"], "pytorch_model.bin"),
    ([f"{STEM}-00001-of-00002.safetensors", f"{STEM}.safetensors.index.json"], f"{STEM}.safetensors.index.json"),
    ([f"{STEM}.fp16-00001-of-00002.safetensors", INDEX], INDEX),
    ([OTHER_INDEX, "model.fp16-00001-of-00002.safetensors"], OTHER_INDEX),
    (["mp_rank_00_model_states.pt", "zero_to_fp32.py"], "mp_rank_00_model_states.pt"),
    (["optimizer.bin", "config.json"], None),
]


@pytest.mark.parametrize(("there", "read"), PREFERENCES)
def test_which_file_of_a_component_is_read(tmp_path, there, read):
    for name in there:
        (tmp_path / name).touch()
    assert weight_file(tmp_path) == (read and tmp_path / read)


def diffusers_trainer(models, folder):
    shutil.copytree(models / "control", folder / "controlnet")
    torch.save({"state": {}}, folder / "optimizer.bin")


def accelerate(models, folder):
    shutil.copy(models / "control" / f"{STEM}.safetensors", folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.bin")


def deepspeed(models, folder):
    (folder / "pytorch_model").mkdir()
    values = {"module": load_file(models / "control.safetensors"), "ds_config": {"x": 1}, "dp_world_size": 1}
    torch.save(values, folder / "pytorch_model" / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("write", [diffusers_trainer, accelerate, deepspeed])
def test_what_trainers_save_in_between_is_a_control(models, tmp_path, monkeypatch, write):
    (tmp_path / "checkpoint-500").mkdir()
    write(models, tmp_path / "checkpoint-500")
    monkeypatch.chdir(tmp_path)
    assert find_control("checkpoint-500", UNetConfig()) == find_control("./checkpoint-500", UNetConfig())
    sd = small_sd(SMALLEST)
    assert_same(ControlNet.load("checkpoint-500", sd), small_control(sd))
