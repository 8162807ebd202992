"""tools.describe: what it says of each kind of file is so, and it reads no more of one than it must."""

import json
import shutil

import pytest
import torch
from reference import load_manifest
from safetensors.torch import load_file, save_file
from small import SMALLEST, small_control, small_sd
from torch.optim.swa_utils import AveragedModel
from written import without_metadata

from controlnet import ControlNet
from controlnet.config import ControlConfig
from ldm import StableDiffusion
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.stored import StoredTensor
from tools import describe
from tools.checkpoints import save_whole
from tools.description import facts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sd = small_sd(SMALLEST)
    control = small_control(sd)
    sd.save(folder / "base.safetensors")
    sd.save(folder / "base", layout="diffusers")
    control.save(folder / "control.safetensors")
    control.save(folder / "control", layout="diffusers")
    control.save(folder / "difference.safetensors", difference_to=sd.unet)
    ControlNet.from_unet(sd.unet).half().save(folder / "fresh.safetensors")
    save_whole(folder / "whole.safetensors", sd, control)
    save_file({"lora_unet_up.alpha": torch.zeros(1)}, folder / "lora.safetensors")
    torch.save({"state_dict": load_file(folder / "control.safetensors")}, folder / "control.pth")
    return folder


def facts(capsys, *argv):
    assert describe.main([str(argument) for argument in (*argv, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys, *argv):
    describe.main([str(argument) for argument in argv])
    return capsys.readouterr().out


def large_file(path, manifest, dtype="F16"):
    """A safetensors file of full size whose numbers are a hole in the file: it takes no room on the disk."""
    header, end = {}, 0
    for key, shape in load_manifest(manifest).items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    written = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    return path


# ------------------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize(("name", "layout"), [("base.safetensors", "original"), ("base", "diffusers")])
def test_a_base(folder, capsys, name, layout):
    (found,) = facts(capsys, folder / name)
    assert (found["kind"], found["layout"], found["prediction"]) == ("base", layout, "v")
    assert (
        found["resolution"] == SMALLEST.resolution
        and not {"hint_channels", "EMA", "family", "not_usable"} & found.keys()
    )
    sd = small_sd(SMALLEST)
    for part, module in (("UNet", sd.unet), ("autoencoder", sd.vae), ("text encoder", sd.text_encoder)):
        assert found["parameters"][part] == sum(parameter.numel() for parameter in module.parameters())
    assert found["precision"] == {"float32": sum(found["parameters"].values())}
    assert found["goes_with"].startswith("ControlNets") and found["values"] == "all finite"


@pytest.mark.parametrize("name", ["control.safetensors", "control", "control.pth", "whole.safetensors"])
def test_a_control_in_every_layout(folder, capsys, monkeypatch, name):
    monkeypatch.setattr("ldm.checkpoints.recognise.SD15", SMALLEST)  # pickles do not describe themselves
    monkeypatch.setattr("tools.checkpoints.SD15", SMALLEST)
    (found,) = facts(capsys, folder / name)
    assert found["kind"] == ("base with a ControlNet" if name.startswith("whole") else "ControlNet")
    assert found["layout"] == ("diffusers" if name == "control" else "original")
    control = small_control(small_sd(SMALLEST))
    assert found["parameters"]["ControlNet"] == sum(parameter.numel() for parameter in control.parameters())
    convs = [control.hint_encoder.convs[-1], *control.zero_convs, control.middle_zero_conv]
    norms = found["zero_convs"]
    assert list(norms) == ["hint", *(f"block {i}" for i in range(len(convs) - 2)), "middle"]
    assert list(norms.values()) == pytest.approx([conv.weight.norm().item() for conv in convs], rel=1e-5)
    assert found["hint_channels"] == 3 and "difference" not in found
    assert ("could not say so" in found.get("pooling", "")) == (name == "control.pth")


def test_what_a_reader_sees(folder, capsys):
    base = text(capsys, folder / "base.safetensors")
    assert "prediction     v\n" in base and "known from     the metadata\n" in base and "all finite" in base
    assert "not trained: all its zero convolutions are zero" in text(capsys, folder / "fresh.safetensors")
    assert "not trained" not in text(capsys, folder / "control.safetensors")
    assert "any base of" in text(capsys, folder / "difference.safetensors")
    assert "float16" in text(capsys, folder / "fresh.safetensors")
    lora = text(capsys, folder / "lora.safetensors")
    assert "a LoRA, which changes a base: pass it as --lora" in lora and "goes with" not in lora


@pytest.mark.parametrize(
    "file, values, reason",
    [
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule is 'linear', expected"),
        ("unet/config.json", {"sample_size": [8, 8]}, "sample_size is [8, 8]"),
        ("unet/config.json", {"block_out_channels": "%3000000000s"}, "block_out_channels is '%3000000000s'"),
        ("vae/config.json", {"block_out_channels": ["%3000000000s"]}, "block_out_channels is ['%3000000000s']"),
        ("text_encoder/config.json", {"num_hidden_layers": "3"}, "only SD 1.x and 2.x are supported"),
    ],
)
def test_a_whole_folder_says_why_it_is_not_usable(folder, tmp_path, capsys, file, values, reason):
    path, config = other_programs_folder(folder, tmp_path), tmp_path / "folder" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    (found,) = facts(capsys, path)
    assert found["kind"] == "base" and reason in found["not_usable"]
    with pytest.raises(ValueError) as loading:
        StableDiffusion.load(path)
    assert str(loading.value) == found["not_usable"]


def test_what_a_folder_says_may_be_null(folder, tmp_path, capsys):
    """As diffusers writes what it leaves at its default: "upcast_attention", say."""
    path = other_programs_folder(folder, tmp_path)
    nulls = {
        "unet/config.json": ("sample_size", "upcast_attention", "num_attention_heads", "dual_cross_attention"),
        "scheduler/scheduler_config.json": ("rescale_betas_zero_snr", "trained_betas"),
    }
    for file, names in nulls.items():
        values = json.loads((path / file).read_text()) | dict.fromkeys(names)
        (path / file).write_text(json.dumps(values))
    (found,) = facts(capsys, path)
    assert found["kind"] == "base" and "not_usable" not in found and found["resolution"] == 512


def test_a_hint_at_the_input_enters_by_one_zero_convolution(tmp_path, capsys):
    ControlNet.from_unet(small_sd().unet, ControlConfig(architecture="concat")).save(tmp_path / "concat.safetensors")
    (found,) = facts(capsys, tmp_path / "concat.safetensors")
    assert found["zero_convs"] == {"hint": 0} and found["training"].startswith("not trained")


def other_programs_folder(folder, tmp_path):
    """A base in diffusers' layout without our metadata."""
    shutil.copytree(folder / "base", tmp_path / "folder")
    without_metadata(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    return tmp_path / "folder"


def test_numbers_that_are_not_finite_are_found(folder, tmp_path, capsys):
    tensors = load_file(folder / "control.safetensors")
    key = "control_model.zero_convs.0.0.weight"
    tensors[key][0, 0] = torch.nan
    tensors["control_model.time_embed.0.bias"][0] = torch.inf
    save_file(tensors, tmp_path / "broken.safetensors", {"config": facts_config(folder)})
    (found,) = facts(capsys, tmp_path / "broken.safetensors")
    assert sorted(found["not_finite"]) == ["control_model.time_embed.0.bias", key]
    assert found["zero_convs"]["block 0"] is None
    shown = text(capsys, tmp_path / "broken.safetensors")
    assert "NaN or infinite in 2 tensors" in shown and "block 0 ?" in shown


@pytest.mark.parametrize("name", ["base.safetensors", "control.safetensors"])
def test_what_would_not_load_is_not_recommended(folder, tmp_path, capsys, name):
    """Recognised by its metadata, but for inpainting (9 channels), or incomplete."""
    whole = load_file(folder / name)
    (first,) = (key for key in whole if key.endswith("input_blocks.0.0.weight"))
    wide = {**whole, first: torch.zeros(8, 9, 3, 3)}
    lacking = {key: value for key, value in whole.items() if not key.endswith("time_embed.0.bias")}
    for tensors, problem in ((wide, "an inpainting model with 9 input channels"), (lacking, "1 key missing (")):
        save_file(tensors, tmp_path / name, {"config": open_checkpoint(folder / name).metadata["config"]})
        (found,) = facts(capsys, tmp_path / name)
        assert problem in found["not_usable"] and "goes_with" not in found
        assert f'  not usable     "{tmp_path / name}" does not fit' in text(capsys, tmp_path / name)
    assert "not_usable" not in facts(capsys, folder / name)[0]


def test_a_control_of_another_version_is_a_control(tmp_path, capsys):
    described = {"unet": {"channels": 8}, "control": {"unheard_of": 1}}
    file = tmp_path / "control.safetensors"
    save_file({"input_hint_block.0.weight": torch.zeros(1)}, file, {"config": json.dumps(described)})
    (found,) = facts(capsys, file)
    assert found["kind"] == "ControlNet" and "use the version that wrote it" in found["not_usable"]


def facts_config(folder):
    return open_checkpoint(folder / "control.safetensors").metadata["config"]


def test_keys_are_listed(folder, capsys):
    (found,) = facts(capsys, folder / "control.safetensors", "--keys")
    tensors = load_file(folder / "control.safetensors")
    assert found["tensors"] == {key: f"{list(tensor.shape)} float32" for key, tensor in tensors.items()}
    assert "control_model.time_embed.0.bias  [32] float32" in text(capsys, folder / "control.safetensors", "--keys")


def test_a_file_cannot_steer_the_terminal(tmp_path, capsys):
    save_file({"a\x1b[2J": torch.zeros(1)}, tmp_path / "a.safetensors", {"title": "x\n\x1b]0;y"})
    shown = text(capsys, tmp_path / "a.safetensors", "--keys")
    assert "\x1b" not in shown and "x??]0;y" in shown


def test_of_a_large_file_only_the_zero_convolutions_are_read(tmp_path, capsys, monkeypatch):
    path = large_file(tmp_path / "control_sd15.safetensors", "ldm_control_sd15_full")
    read = []
    load = StoredTensor.load
    monkeypatch.setattr(StoredTensor, "load", lambda self, *args: read.append(self) or load(self, *args))
    (found,) = facts(capsys, path)
    assert len(read) == 14 and sum(tensor.numel for tensor in read) < 13_000_000
    assert found["bytes"] == path.stat().st_size > 2.8e9 and found["values"].startswith("not read")
    assert (found["kind"], found["family"]) == ("base with a ControlNet", "SD 1.x")
    assert (found["architecture"], found["prediction"]) == ("sd15", "eps")
    # From the reference's table of counts.
    assert (found["parameters"]["UNet"], found["parameters"]["ControlNet"]) == (859_520_964, 361_279_120)
    assert len(found["zero_convs"]) == 14


def test_what_an_sd2_base_predicts_and_how_that_is_known(tmp_path, capsys):
    path = large_file(tmp_path / "mine.safetensors", "ldm_sd21_checkpoint")
    (found,) = facts(capsys, path)
    assert found["family"] == "SD 2.x" and found["prediction"] == "v"
    assert found["known_from"].startswith("assumed")
    path = path.rename(tmp_path / "v2-1_512-ema-pruned.safetensors")
    (found,) = facts(capsys, path)
    assert found["prediction"] == "eps" and "the file's name" in found["known_from"]


# ------------------------------------------------------------------------------------------------------------ diff


def test_diff_names_what_differs(folder, tmp_path, capsys):
    control = folder / "control.safetensors"
    tensors = load_file(control)
    removed = tensors.pop("control_model.time_embed.0.bias")
    tensors["new"] = removed
    tensors["control_model.time_embed.2.bias"] = tensors["control_model.time_embed.2.bias"].half()
    tensors["control_model.zero_convs.0.0.bias"] = torch.zeros(3)
    tensors["control_model.zero_convs.1.0.bias"][2] += 0.5
    save_file(tensors, tmp_path / "other.safetensors")
    arguments = [str(control), "--diff", str(tmp_path / "other.safetensors")]
    assert describe.main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    removed, added = list(found.values())[:2]
    assert removed == ["control_model.time_embed.0.bias", "metadata config", "metadata format"] and added == ["new"]
    assert found["different"] == [
        "control_model.time_embed.2.bias: [32] float32, [32] float16",
        "control_model.zero_convs.0.0.bias: [8] float32, [3] float32",
    ]
    assert "numbers" not in found
    assert describe.main([*arguments, "--values"]) == 1
    shown = capsys.readouterr().out
    assert "control_model.zero_convs.1.0.bias: 1 of 8, by up to 0.5" in shown


def test_diff_of_alike_files(folder, tmp_path, capsys):
    control = folder / "control.safetensors"
    (tmp_path / "copy.safetensors").write_bytes(control.read_bytes())
    assert describe.main([str(control), "--diff", str(tmp_path / "copy.safetensors"), "--values"]) == 0
    for name in "ab":  # the same NaN is not a difference
        save_file({"x": torch.tensor([1, torch.nan])}, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert describe.main([files[0], "--diff", files[1], "--values"]) == 0
    assert capsys.readouterr().out.startswith("alike")
    assert describe.main([str(control), str(control), "--diff", str(control)]) == 2


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_file_that_cannot_be_read_does_not_hide_the_others(folder, tmp_path, capsys):
    (tmp_path / "empty.safetensors").touch()
    files = [str(tmp_path / "empty.safetensors"), str(folder / "control.safetensors"), str(tmp_path / "none")]
    assert describe.main(files) == 2
    shown = capsys.readouterr()
    assert "zero convs" in shown.out
    assert [line.split(": ")[0] for line in shown.err.splitlines() if line.startswith("describe")] == ["describe"] * 2
    assert describe.main(files[:1]) == 2
    assert "incomplete or damaged" in capsys.readouterr().err


def test_the_parts_of_a_state_are_counted_apart(tmp_path):
    control = small_control(small_sd(SMALLEST))
    state = {"step": 2, "control": control.state_dict(), "decoder": {"x.bias": torch.ones(2)}}
    torch.save({**state, "average": AveragedModel(control).state_dict()}, tmp_path / "000002.pt")
    size = sum(parameter.numel() for parameter in control.parameters())
    found = facts_of(str(tmp_path / "000002.pt"), values=False, keys=False)
    assert found["parameters"] == {"ControlNet": size, "moving average (EMA)": size, "UNet's decoder": 2}
