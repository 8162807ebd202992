"""What people type for a checkpoint, and what is said where there is none."""

from pathlib import Path

import pytest
from small import error_of

from controlnet.checkpoint import find_control
from ldm.checkpoints.extras import LORAS, find_extra, given_extra
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.published import as_path, find
from ldm.config import SD15, TINY
from tools.checkpoints import find_model


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The folder of weights; the current one and the home folder are others."""
    for name in ("weights", "here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize(
    ("typed", "file"),
    [("~/a.ckpt", "home/a.ckpt"), ("models\\a.ckpt", "here/models/a.ckpt"), ("a.ckpt", "here/a.ckpt")],
)
def test_paths_are_meant_as_they_are_typed(weights, typed, file):
    file = weights.parent / file
    file.parent.mkdir(exist_ok=True)
    file.touch()
    lora = given_extra(typed, LORAS, "LoRA")
    for found in (as_path(typed), find(typed)[0], find_control(typed, SD15.unet), find_model(typed)[0], lora):
        assert found.resolve() == file


def test_a_backslash_may_be_part_of_a_name(weights):
    Path("a\\b.ckpt").touch()
    assert as_path("a\\b.ckpt") == Path("a\\b.ckpt")


@pytest.mark.parametrize("text", ["", "  "])
@pytest.mark.parametrize("look", [find, open_checkpoint, find_model, lambda name: find_control(name, SD15.unet)])
def test_nothing_is_not_the_current_folder(weights, text, look):
    assert "the path of a checkpoint is empty" in error_of(look, text)


ADVICE = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "`python -m tools.download sd15`",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "`python -m tools.download sd15-inpainting`",
    "stabilityai/stable-diffusion-2-1-base": "`python -m tools.download sd21-base`",
    "stabilityai/stable-diffusion-2-1": "`python -m tools.download sd21`",
    "stabilityai/stable-diffusion-2-1-unclip": "`hf download stabilityai/stable-diffusion-2-1-unclip --local-dir",
    "https://huggingface.co/x/y/resolve/main/control_v11f1p_sd15_depth.pth": "`python -m tools.download depth`",
    "https://huggingface.co/x/y/resolve/main/control_v11p_sd15_canny_fp16.safetensors": "tools.download canny`",
    "https://huggingface.co/x/y/resolve/main/control_v11p_sd15s2_lineart_anime.pth": "tools.download lineart_anime`",
    "~nobody-by-this-name/sd15.ckpt": "give the path of a checkpoint",
    f"{'x' * 300}.ckpt": 'xxx..." is longer than paths can be: give the path of a checkpoint',
    "https://civitai.com/api/download/models/1": "it is a URL, so download the file and give its path",
    "owner/some.model": "`hf download owner/some.model --local-dir FOLDER` and give FOLDER",
    "nowhere.safetensors": "give the path of a checkpoint",
    "models/foo.safetensors": "give the path of a checkpoint",
    "models/vae.pt": "give the path of a checkpoint",
}


@pytest.mark.parametrize("address", ADVICE)
def test_repositories_and_addresses_are_answered_with_the_way_to_get_them(weights, address):
    for sentence in (error_of(open_checkpoint, address), error_of(find_control, address, SD15.unet)):
        assert ADVICE[address] in sentence


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pth", ".pt", ".bin"])
def test_names_stand_for_files_with_any_suffix(weights, suffix):
    """Of bases, ControlNets, LoRAs and embeddings."""
    file = weights / f"v2.mine{suffix}"
    file.touch()
    assert find("v2.mine")[0] == find_control("v2.mine", SD15.unet) == find_extra("v2.mine", LORAS) == file


def test_names_in_weights(weights):
    (weights / "mine.safetensors").touch()
    assert find("mine")[0] == find_model("mine")[0] == find_control("mine", TINY.unet) == weights / "mine.safetensors"
    (weights / "tiny-canny.safetensors").touch()
    assert find_model("canny")[0] == weights / "tiny-canny.safetensors"
    (weights / "control_v11p_sd15_canny.pth").touch()
    assert find_model("control_v11p_sd15_canny")[0] == weights / "control_v11p_sd15_canny.pth"
    sentence = error_of(find_model, "canny")
    assert "short for several ControlNets" in sentence and "control_v11p_sd15_canny.pth or tiny-canny" in sentence
    (weights / "control_v11p_sd15_openpose.pth").touch()
    assert "control_v11p_sd15_openpose.pth is for another base, so say --base sd15" in error_of(
        find_control, "openpose", TINY.unet
    )
