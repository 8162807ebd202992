"""tools.transfer, add_control and merge: each gives the sum that it is named after, and writes a ControlNet."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALLEST, for_inpainting, small_control, small_sd, strengthened

import infer
import train
from controlnet import ControlNet
from controlnet.config import ControlConfig
from ldm import StableDiffusion
from tools import add_control, convert, describe, merge, transfer
from tools.checkpoints import save_whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two bases of one family and one of another, two ControlNets, and one in a file with its base."""
    folder = tmp_path_factory.mktemp("models")
    sd = small_sd(SMALLEST)
    sd.save(folder / "old.safetensors")
    other = strengthened(small_sd(SMALLEST))
    other.save(folder / "new.safetensors")
    other.save(folder / "new", layout="diffusers")
    for_inpainting(other).save(folder / "inpainting.safetensors")
    encoder = {key: value for key, value in load_file(folder / "new.safetensors").items() if key.startswith("model.")}
    save_file(encoder, folder / "bare.safetensors", {"config": json.dumps(SMALLEST.to_dict())})
    StableDiffusion(replace(SMALLEST, unet=replace(SMALLEST.unet, linear_projections=True))).save(
        folder / "sd2.safetensors"
    )
    control = small_control(sd)
    control.save(folder / "a.safetensors")
    control.save(folder / "difference.safetensors", difference_to=sd.unet)
    save_whole(folder / "whole.safetensors", sd, control)
    strengthened(control).save(folder / "b.safetensors")
    control.half().save(folder / "half.safetensors")
    ControlNet.from_unet(sd.unet, ControlConfig(hint_channels=1)).save(folder / "gray.safetensors")
    return folder


def run(tool, *argv):
    return tool.main([str(argument) for argument in argv])


def error(capsys, tool, *argv):
    """The sentence of a run that fails."""
    assert run(tool, *argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def assert_close(got, want):
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- transfer


def transferred(folder):
    """The formula, on the files' tensors."""
    own, old, new = (load_file(folder / f"{name}.safetensors") for name in ("a", "old", "new"))
    for key in own:
        base_key = key.replace("control_model.", "model.diffusion_model.")
        if base_key in old:
            own[key] = own[key] + (new[base_key] - old[base_key])
    return own


@pytest.mark.parametrize("new", ["new.safetensors", "new", "inpainting.safetensors", "bare.safetensors"])
def test_transfer_adds_the_difference_of_the_encoders(folder, tmp_path, new):
    out = tmp_path / "out.safetensors"
    bases = ("--from", folder / "old.safetensors", "--to", folder / new)
    assert run(transfer, folder / "a.safetensors", *bases, "--out", out) == 0
    want, before = transferred(folder), load_file(folder / "a.safetensors")
    assert_close(load_file(out), want)
    changed = {key for key in want if not torch.equal(want[key], before[key])}
    assert any("input_blocks.1." in key for key in changed) and any("middle_block." in key for key in changed)
    assert not any("zero_convs" in key or "input_hint_block" in key or "middle_block_out" in key for key in changed)


def test_transfer_to_the_same_base_changes_no_bit(folder, tmp_path):
    old, out = folder / "old.safetensors", tmp_path / "out.safetensors"
    assert run(transfer, folder / "a.safetensors", "--from", old, "--to", old, "--out", out) == 0
    got, want = load_file(out), load_file(folder / "a.safetensors")
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ["whole", "difference"])
def test_a_file_that_knows_its_base_needs_no_other_to_be_transferred(folder, tmp_path, name):
    out = tmp_path / "out.safetensors"
    new = folder / "new.safetensors"
    assert run(transfer, folder / f"{name}.safetensors", "--to", new, "--out", out) == 0
    assert_close(load_file(out), transferred(folder))


def test_transfer_stays_within_a_family(folder, tmp_path, capsys):
    control, old, sd2 = (folder / f"{name}.safetensors" for name in ("a", "old", "sd2"))
    out = ("--out", tmp_path / "out.safetensors")
    assert "the base that it goes to is of" in error(capsys, transfer, control, "--from", old, "--to", sd2, *out)
    assert "the base that it comes from is" in error(capsys, transfer, control, "--from", sd2, "--to", old, *out)
    assert "--from" in error(capsys, transfer, control, "--to", old, *out)
    assert "holds no ControlNet" in error(capsys, transfer, old, "--to", old, *out)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ add_control


def test_a_fresh_control_is_a_base_and_a_control_that_does_nothing(folder, tmp_path):
    old, out = folder / "old.safetensors", tmp_path / "ini.safetensors"
    assert run(add_control, old, "--out", out) == 0
    tensors, base = load_file(out), load_file(old)
    assert all(torch.equal(tensors[key], base[key]) for key in base)
    key = "input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(tensors[f"control_model.{key}"], base[f"model.diffusion_model.{key}"])

    sd = StableDiffusion.load(out)
    assert sd.config == SMALLEST
    control = ControlNet.load(out, sd.unet)
    x, hint = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        residuals = control(x, torch.tensor([500]), sd.encode_text(["a"]), hint)
    assert all(not residual.any() for residual in residuals)
    assert control.hint_encoder.convs[0].weight.any()  # and yet it can learn


def test_the_seed_decides_over_the_hint_encoder_alone(folder, tmp_path):
    old = folder / "old.safetensors"
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        options = ("--seed", seed, "--hint-channels", 1, "--dtype", "fp16")
        assert run(add_control, old, *options, "--out", tmp_path / f"{name}.safetensors") == 0
    a, again, b = (load_file(tmp_path / f"{name}.safetensors") for name in ("a", "again", "b"))
    assert all(torch.equal(a[key], again[key]) and a[key].dtype == torch.half for key in a)
    assert {key.split(".")[1] for key in a if not torch.equal(a[key], b[key])} == {"input_hint_block"}
    assert a["control_model.input_hint_block.0.weight"].shape[1] == 1


def test_a_base_without_its_autoencoder_gets_one_and_what_it_does_not_say(folder, tmp_path):
    tensors, out = load_file(folder / "old.safetensors"), tmp_path / "ini.safetensors"
    without = {key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}
    config = replace(SMALLEST, schedule=replace(SMALLEST.schedule, prediction="v"))
    save_file(without, tmp_path / "base.safetensors", {"config": json.dumps(config.to_dict())})
    options = ("--vae", folder / "new.safetensors", "--zero-snr")
    assert run(add_control, tmp_path / "base.safetensors", *options, "--out", out) == 0
    got, vae = load_file(out), load_file(folder / "new.safetensors")
    assert all(torch.equal(got[key], vae[key]) for key in vae if key.startswith("first_stage_model."))
    assert StableDiffusion.load(out).config.schedule.zero_terminal_snr


def test_a_fresh_control_has_no_place_in_a_folder(folder, tmp_path, capsys):
    old = folder / "old.safetensors"
    assert "one file" in error(capsys, add_control, old, "--out", tmp_path / "folder")
    out = tmp_path / "out.safetensors"
    assert "--hint-channels is 0" in error(capsys, add_control, old, "--hint-channels", 0, "--out", out)
    assert "the seed is" in error(capsys, add_control, old, "--seed", 2**70, "--out", out)
    assert "not a base" in error(capsys, add_control, folder / "a.safetensors", "--out", out)


# ------------------------------------------------------------------------------------------------------------ merge


def test_merge_is_a_weighted_sum(folder, tmp_path):
    names = [folder / f"{name}.safetensors" for name in ("a", "b")]
    assert run(merge, *names, "--weights", 0.7, 0.3, "--out", tmp_path / "out.safetensors") == 0
    a, b = (load_file(name) for name in names)
    assert_close(load_file(tmp_path / "out.safetensors"), {key: 0.7 * a[key] + 0.3 * b[key] for key in a})
    assert run(merge, names[0], *names, "--out", tmp_path / "mean.safetensors") == 0
    assert_close(load_file(tmp_path / "mean.safetensors"), {key: (2 * a[key] + b[key]) / 3 for key in a})
    assert all(torch.equal(load_file(names[0])[key], a[key]) for key in a)  # the sources are as they were


def test_merge_of_differences_and_of_halves(folder, tmp_path):
    difference, old, half = (folder / f"{name}.safetensors" for name in ("difference", "old", "half"))
    out = tmp_path / "out.safetensors"
    assert run(merge, difference, half, "--base", old, "--out", out) == 0
    a, b = load_file(folder / "a.safetensors"), load_file(half)
    assert_close(load_file(out), {key: (a[key] + b[key].float()) / 2 for key in a})
    assert run(merge, half, half, "--weights", 2, -1, "--out", out, "--force") == 0
    got = load_file(out)
    assert all(got[key].dtype == torch.half and torch.equal(got[key], b[key]) for key in b)


def test_what_cannot_be_merged(folder, tmp_path, capsys):
    a, gray, out = folder / "a.safetensors", folder / "gray.safetensors", ("--out", tmp_path / "out.safetensors")
    assert "one ControlNet is given, expected two or more" in error(capsys, merge, a, *out)
    assert "no ControlNet is given" in error(capsys, merge, *out)
    assert "--weights has 1" in error(capsys, merge, a, a, "--weights", 1, *out)
    assert "--weights has 2" in error(capsys, merge, a, a, "--weights", "nan", 1, *out)
    assert "another architecture" in error(capsys, merge, a, gray, *out)
    assert "--base" in error(capsys, merge, a, folder / "difference.safetensors", *out)
    assert run(merge, a, a, "--weights", 1, 1, *out) == 0 and "add up to 2" in capsys.readouterr().err
    assert "--force" in error(capsys, merge, a, a, *out)


# ------------------------------------------------------------------------------------------------------------- typed


def test_an_empty_name_is_not_left_out(folder, tmp_path, capsys):
    """As a script gives it whose variable is not set."""
    control, base = folder / "a.safetensors", folder / "old.safetensors"
    out = ["--out", tmp_path / "out.safetensors"]
    for tool, *arguments in (
        (transfer, control, "--from", "", "--to", base, *out),
        (transfer, control, "--from", base, "--to", "  ", *out),
        (merge, control, "", *out),
        (merge, control, control, "--base", "", *out),
        (merge, "--base", "", "--lora", control, *out),
        (add_control, "", *out),
        (convert, control, "--difference", "--base", "", *out),
        (convert, base, "--vae", "", *out),
        (describe, control, "--diff", ""),
        (train, "--base", base, "--control", "", "--dry-run", "--out", tmp_path / "run"),
    ):
        assert "the path of a checkpoint is empty" in error(capsys, tool, *arguments)
    for option in (["--hint", ""], ["--prompt", "a", "--init", "  "], ["--prompt", "a", "--init", base, "--mask", ""]):
        assert "path of an image" in error(capsys, infer, "--base", base, *option)
    assert not list(tmp_path.iterdir())
