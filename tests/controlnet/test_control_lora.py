"""Control-LoRA: the encoder of the base with changes of low rank is the ControlNet that was meant."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALLEST, assert_same, error_of, for_inpainting, small_control, small_sd, strengthened

from controlnet.layouts import control_map
from controlnet.model import ControlNet
from ldm.checkpoints.save import gather
from ldm.fast.packed import pack
from tools import convert, describe, transfer

RANK = 3


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


@pytest.fixture(scope="module")
def made(sd, tmp_path_factory):
    """-> the file, and the ControlNet that it means for this base, in which every encoder's bias is the file's own but
    the first."""
    control, generator, factors = small_control(sd), torch.Generator().manual_seed(4), {}
    sources = control_map(SMALLEST.unet, control.config, "").sources(dict(control.named_parameters()))
    for name, own in control.encoder.named_parameters(prefix="encoder"):
        base = sd.unet.get_parameter(name)
        if own.ndim == 1:
            own.data = base + 0.1 if name != "encoder.blocks.0.conv.bias" else base.clone()
            continue
        up = torch.randn(len(base), RANK, *[1] * (own.ndim - 2), generator=generator)
        down = 0.01 * torch.randn(RANK, *base.shape[1:], generator=generator)
        stem = sources[name].key.removesuffix(".weight")
        factors |= {f"{stem}.up": up, f"{stem}.down": down}
        own.data = base + (up.flatten(1) @ down.flatten(1)).reshape(base.shape)
    tensors = gather(control, control_map(SMALLEST.unet, control.config, ""), None)
    tensors = {key: value for key, value in tensors.items() if f"{key.removesuffix('.weight')}.up" not in factors}
    del tensors["input_blocks.0.0.bias"]
    file = tmp_path_factory.mktemp("made") / "lora.safetensors"
    save_file({**tensors, **factors, "lora_controlnet": torch.zeros(0)}, file)
    return file, control


def test_it_is_the_control_that_was_meant(sd, made):
    file, meant = made
    loaded = ControlNet.load(file, sd)
    assert_same(loaded, meant)
    pointers = {parameter.data_ptr() for parameter in sd.unet.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in loaded.parameters())  # it may be trained
    assert next(ControlNet.load(file, sd, dtype=torch.float16).parameters()).dtype == torch.float16


def test_it_goes_with_any_base_of_the_family(sd, made):
    file, meant = made
    assert_same(ControlNet.load(file, for_inpainting(sd)), meant)  # whose first convolution reads more
    packed = copy.deepcopy(sd)
    pack(packed.unet)  # whose weights are not parameters any more
    assert_same(ControlNet.load(file, packed), meant)
    other = strengthened(small_sd(SMALLEST))
    weight = "encoder.middle.res1.conv1.weight"
    moved = meant.get_parameter(weight) + other.unet.get_parameter(weight) - sd.unet.get_parameter(weight)
    torch.testing.assert_close(ControlNet.load(file, other).get_parameter(weight), moved)


def test_tools_take_it_with_its_base(sd, made, tmp_path, capsys):
    file, meant = made
    sd.save(tmp_path / "base.safetensors")
    assert convert.main([str(file), "--out", str(tmp_path / "out.safetensors")]) == 2
    assert "name the base to add with --base" in capsys.readouterr().err
    base = str(tmp_path / "base.safetensors")
    assert convert.main([str(file), "--base", base, "--out", str(tmp_path / "whole.safetensors")]) == 0
    assert transfer.main([str(file), "--to", base, "--out", str(tmp_path / "moved.safetensors")]) == 0
    for name in ("whole", "moved"):
        assert_same(ControlNet.load(tmp_path / f"{name}.safetensors", sd), meant)
    assert describe.main([str(file)]) == 0
    assert "(a Control-LoRA)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [lambda up: up[:, :1], lambda up: up[1:], lambda up: up[:, 0, 0, 0], lambda up: None]
)
def test_changes_of_another_shape_are_refused(sd, made, tmp_path, change):
    tensors = load_file(made[0])
    up = change(tensors.pop("input_blocks.0.0.up"))
    tensors |= {} if up is None else {"input_blocks.0.0.up": up.contiguous()}
    save_file(tensors, tmp_path / "bad.safetensors")
    message = error_of(ControlNet.load, tmp_path / "bad.safetensors", sd)
    assert "does not fit: input_blocks.0.0.up is" in message and "expected a product of [8, 4, 3, 3]" in message
