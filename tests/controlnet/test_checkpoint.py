"""A ControlNet's files: what is loaded is what was saved, from every layout, by path or by name."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from minis import MINIS, mini_unet
from reference import filled, load_manifest
from safetensors.torch import load_file, save_file
from small import SMALLEST, assert_same, error_of, small_control, small_sd
from torch.optim.swa_utils import AveragedModel
from written import rewrite, without_metadata

from controlnet.checkpoint import find_control
from controlnet.config import ControlConfig
from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.load import without_weights
from ldm.checkpoints.open import open_checkpoint
from ldm.config import SD15, SD21, SD21_BASE, TINY
from ldm.fast.packed import pack
from ldm.unet import UNet
from tools.checkpoints import find_model
from tools.description import contents


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


# ------------------------------------------------------------------------------------------------- original layout


@pytest.mark.parametrize("style", MINIS)
def test_control_round_trip(tmp_path, style):
    original = filled(load_manifest(f"mini_{style}_control_only"))
    save_file(original, tmp_path / "original.safetensors")
    control = ControlNet.load(tmp_path / "original.safetensors", mini_unet(style))
    assert torch.equal(control.hint_encoder.convs[7].weight, original["control_model.input_hint_block.14.weight"])
    assert torch.equal(control.zero_convs[11].weight, original["control_model.zero_convs.11.0.weight"])
    assert not control.training and not any(parameter.requires_grad for parameter in control.parameters())
    control.save(tmp_path / "control.safetensors")
    saved = load_file(tmp_path / "control.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)


def test_control_keeps_its_own_configuration(sd, tmp_path):
    """By our description, or without it by its shapes."""
    path, config = tmp_path / "control.safetensors", ControlConfig(1, (4, 4, 8, 8, 16, 16, 32))
    ControlNet.from_unet(sd.unet, config).save(path)
    metadata = open_checkpoint(path).metadata
    assert metadata["format"] == "pt" and json.loads(metadata["config"])["unet"]["channels"] == SMALLEST.unet.channels
    assert ControlNet.load(path, sd.unet).config == config
    without_metadata(path)
    assert ControlNet.load(path, sd.unet).config == config


# -------------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("described", [True, False], ids=["our base", "another program's"])
def test_a_pipeline_holds_a_base_and_its_control(sd, control, folder, described):
    """Both parts were saved by us, or the control alone."""
    control.save(folder / "controlnet", layout="diffusers")
    if not described:
        without_metadata(folder / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = StableDiffusion.load(folder)
    assert_same(loaded, sd)
    assert loaded.config.name == ("small" if described else "diffusers")
    assert_same(ControlNet.load(folder, sd.unet), control)


def test_controls_in_diffusers_layout(sd, control, tmp_path):
    control.save(tmp_path / "control", layout="diffusers")
    assert_same(ControlNet.load(tmp_path / "control", sd.unet), control)
    assert_same(ControlNet.load(tmp_path / "control" / "diffusion_pytorch_model.safetensors", sd.unet), control)
    odd = ControlNet(sd.unet, ControlConfig(hint_widths=(4, 5, 6, 7, 8, 9, 10)))
    assert "in pairs" in error_of(odd.save, tmp_path / "odd", layout="diffusers")


def test_a_whole_file_is_its_own_base_and_its_control(sd, control, base, tmp_path):
    control.save(tmp_path / "control.safetensors")
    whole = tmp_path / "whole.safetensors"
    altered = "model.diffusion_model.output_blocks.1.0.in_layers.0.bias"

    def change(tensors):
        tensors.update(load_file(tmp_path / "control.safetensors"), logvar=torch.zeros(1000))
        tensors[altered] += 1

    rewrite(base, change, whole)
    with pytest.warns(UserWarning, match="carries the base that it was trained with, and that is not the one in use"):
        loaded = ControlNet.load(whole, sd.unet)
    assert_same(loaded, control)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = StableDiffusion.load(whole)
        ControlNet.load(whole, own.unet)
    assert torch.equal(own.unet.decoder.blocks[1].res.norm1.bias, sd.unet.decoder.blocks[1].res.norm1.bias + 1)
    assert contents(open_checkpoint(whole)).kind == "base with a ControlNet"


def test_difference_files_are_added_to_the_base(sd, control, tmp_path):
    path = tmp_path / "difference.safetensors"
    control.save(path, difference_to=sd.unet)
    tensors = load_file(path)
    assert "difference" in tensors  # the mark that other programs read
    own, theirs = control.encoder.blocks[0].conv.bias, sd.unet.encoder.blocks[0].conv.bias
    assert torch.equal(tensors["control_model.input_blocks.0.0.bias"], own - theirs)
    assert torch.equal(tensors["control_model.zero_convs.0.0.bias"], control.zero_convs[0].bias)
    packed = copy.deepcopy(sd.unet)
    pack(packed)  # has no parameters there
    assert torch.equal(ControlNet.load(path, packed).encoder.blocks[0].conv.bias, own)
    again = ControlNet.load(path, sd.unet)
    for name, value in control.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, atol=1e-6)
    half = ControlNet.load(path, sd.unet, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_what_is_no_copy_cannot_be_moved(sd, control, tmp_path):
    lite = ControlNet.from_unet(sd.unet, ControlConfig(architecture="lite"))
    path = tmp_path / "lite"
    assert "a ControlNet-lite has no copy" in error_of(lite.save, path, difference_to=sd.unet)
    assert "a ControlNet-lite has no copy" in error_of(lite.transfer, sd.unet, sd.unet)
    assert not path.exists()
    lite.save(path)
    rewrite(path, lambda tensors: {**tensors, "difference": torch.zeros(1)})  # a lie
    assert "a ControlNet-lite has no copy" in error_of(ControlNet.load, path, sd.unet)
    wide = UNet(replace(SMALLEST.unet, channels=32))
    assert "another architecture" in error_of(control.transfer, sd.unet, wide)


# ----------------------------------------------------------------------------------------------------------- names


@pytest.fixture
def weights(sd, tmp_path, monkeypatch):
    """An empty folder of weights, which is not the current one."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize(
    "name, config, file",
    [
        ("pose", TINY, "tiny-pose.safetensors"),
        ("tiny-pose", TINY, "tiny-pose.safetensors"),
        ("circles", TINY, "tiny-fill50k.safetensors"),
        ("fill50k", TINY, "tiny-fill50k.safetensors"),
        ("canny", SD15, "control_v11p_sd15_canny.pth"),
        ("lineart_anime", SD15, "control_v11p_sd15s2_lineart_anime.pth"),
        ("canny", SD21, "control_v11p_sd21_canny.safetensors"),
        ("canny", SD21_BASE, "control_v11p_sd21_canny.safetensors"),
        ("mine", SD15, "mine.safetensors"),
        ("mine.bin", SD15, "mine.bin"),
    ],
)
def test_names_are_found_in_weights(weights, name, config, file):
    for other in ("control_v11p_sd15_canny_2.pth", "tiny-canny.safetensors", "control_v11p_sd15_inpaint.pth"):
        (weights / other).touch()
    (weights.parent / "here" / name).mkdir()  # a folder of something else, by chance
    assert find_control(name, config.unet) != weights / file
    (weights / file).touch()
    assert find_control(name, config.unet) == weights / file


def test_a_name_that_is_nowhere_says_where_it_was_looked_for(weights):
    message = error_of(find_control, "pose", SD15.unet)
    assert message.startswith(f'there is no ControlNet "pose", neither as a file nor in {weights}: give the path of')


@pytest.mark.parametrize("architecture, averaged", [("full", False), ("full", True), ("lite", True), ("concat", False)])
def test_a_state_of_a_run_is_taken_as_what_it_saves(sd, tmp_path, architecture, averaged):
    """With everything else that is in one, and without a warning."""
    config = ControlConfig(architecture=architecture)
    saved, other = (ControlNet.from_unet(sd.unet, config) for _ in range(2))
    torch.nn.init.normal_(saved.hint_encoder.convs[-1].weight)
    state = {"step": 3, "control": (other if averaged else saved).state_dict(), "decoder": {"x.bias": torch.ones(2)}}
    if averaged:
        state["average"] = AveragedModel(saved).state_dict()
    moments = {0: {"exp_avg": torch.ones(2, 2), "step": torch.tensor(3.0)}}
    state |= {"optimisation": {"optimizer": {"state": moments}, "scaler": {}}, "position": {"seen": 6}}
    torch.save(state, tmp_path / "000003.pt")
    with warnings.catch_warnings(action="error"):
        loaded = ControlNet.load(tmp_path / "000003.pt", sd)
    assert loaded.config == config
    assert_same(loaded, saved)
    del state["control"], state["decoder"]
    torch.save({**state, "average": {}}, tmp_path / "000003.pt")
    assert "holds no ControlNet" in error_of(ControlNet.load, tmp_path / "000003.pt", sd)


def test_a_run_is_taken_by_its_folder(sd, control, tmp_path):
    control.save(tmp_path / "control.safetensors")
    error_of(find_control, tmp_path / "run", sd.config.unet)
    (tmp_path / "settings.json").write_text("{}")
    assert find_control(tmp_path, sd.config.unet) == find_model(str(tmp_path))[0] == tmp_path / "control.safetensors"


def test_a_base_is_a_model_or_its_unet(sd, control, weights):
    control.save(weights / "mine.safetensors")
    for base in (sd, sd.unet):
        loaded = ControlNet.load("mine", base)
        assert_same(loaded, control)
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_what_ships_is_found_by_its_name():
    """With the UNet alone, too, whose architecture tells the family."""
    with without_weights():
        unet = UNet(TINY.unet)
    for name in ("fill50k", "tiny-pose"):
        assert ControlNet.load(name, unet, "cpu", torch.float32).encoder.config == TINY.unet


# --------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "values", [{"hint_widths": (16, 32)}, {"hint_channels": 0}, {"hint_channels": "3"}, {"architecture": "heavy"}]
)
def test_a_configuration_that_makes_no_sense_cannot_be_built(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ControlConfig(**values)


def test_of_a_state_the_file_that_its_run_has_saved_says_whether_it_is_pooled(tmp_path, monkeypatch):
    sd = small_sd(SMALLEST)
    pooled = ControlNet.from_unet(sd.unet, ControlConfig(global_average_pooling=True))
    pooled.save(tmp_path / "control.safetensors")
    (tmp_path / "settings.json").touch()
    (tmp_path / "state").mkdir()
    torch.save({"step": 3, "control": pooled.state_dict()}, tmp_path / "state/000003.pt")
    monkeypatch.chdir(tmp_path / "state")
    for path in (tmp_path / "state/000003.pt", "000003.pt"):
        assert ControlNet.load(path, sd).config == pooled.config
        assert not ControlNet.load(path, sd, global_average_pooling=False).config.global_average_pooling


def test_what_diffusers_cannot_describe_is_said_in_words(sd, tmp_path):
    """An advice that holds in Python and for tools.convert alike."""
    lite = ControlNet.from_unet(sd.unet, ControlConfig(architecture="lite"))
    said = error_of(lite.save, tmp_path / "lite", layout="diffusers")
    assert "of the architecture lite" in said and said.endswith("as a file whose name ends in .safetensors")
    assert not list(tmp_path.iterdir())
    assert "ControlConfig" not in said and "layout=" not in said


def test_a_state_dict_alone_is_a_control(sd, control, tmp_path):
    torch.save(control.state_dict(), tmp_path / "nb.pt")
    assert_same(ControlNet.load(tmp_path / "nb.pt", sd), control)
    assert "a ControlNet: pass it as --control" in error_of(StableDiffusion.load, tmp_path / "nb.pt")
