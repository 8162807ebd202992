"""tools.convert: what goes to another layout and back is the same to the bit, and nothing is lost on the way."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import SMALLEST, small_control, small_sd, strengthened

from controlnet import ControlNet
from controlnet.config import ControlConfig
from ldm import StableDiffusion
from ldm.config import ScheduleConfig, TextConfig
from tools import cli, convert
from tools.checkpoints import save_whole

# SD 2.x at the same size: linear projections, and a text encoder whose last layer is not used.
SMALL_SD2 = replace(
    SMALLEST,
    name="small-sd2",
    unet=replace(SMALLEST.unet, linear_projections=True, fp32_logits=True),
    text=TextConfig("open_clip", width=16, heads=2, layers=2, vocabulary=600),
    schedule=ScheduleConfig("v"),
)
# SD 1.x is told by the context of its first transformer, which SMALLEST lacks.
SMALL_SD1 = replace(SMALLEST, unet=replace(SMALLEST.unet, attention=(True, True)))


SMALL_INPAINTING = replace(SMALLEST, unet=replace(SMALLEST.unet, inpainting=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, its ControlNet, both in one file, and a base of the kind of SD 2.x."""
    folder = tmp_path_factory.mktemp("models")
    sd = small_sd(SMALLEST)
    control = small_control(sd)
    sd.save(folder / "base.safetensors")
    control.save(folder / "control.safetensors")
    save_whole(folder / "whole.safetensors", sd, control)
    StableDiffusion(SMALL_INPAINTING).save(folder / "inpainting.safetensors")
    torch.manual_seed(2)
    strengthened(StableDiffusion(SMALL_SD2)).save(folder / "sd2.safetensors")
    return folder


def run(*argv):
    return convert.main([str(argument) for argument in argv])


def error(capsys, *argv):
    """The sentence of a run that fails."""
    assert run(*argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("convert: ")
    return line


def assert_same(path, expected):
    """The same tensors to the bit, in the same types."""
    got, want = load_file(path), load_file(expected)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in got)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", ["base", "control", "inpainting"])
def test_to_diffusers_and_back_gives_the_same_bits(folder, tmp_path, name):
    source = folder / f"{name}.safetensors"
    assert run(source, "--out", tmp_path / "folder") == 0
    assert (tmp_path / "folder" / ("config.json" if name == "control" else "model_index.json")).is_file()
    assert run(tmp_path / "folder", "--out", tmp_path / "back.safetensors") == 0
    assert_same(tmp_path / "back.safetensors", source)
    if name == "control":
        assert metadata(tmp_path / "back.safetensors") == metadata(source)


def test_sd2_to_diffusers_and_back_lacks_the_unused_layer_alone(folder, tmp_path):
    assert run(folder / "sd2.safetensors", "--out", tmp_path / "folder") == 0
    assert run(tmp_path / "folder", "--out", tmp_path / "back.safetensors") == 0
    unused = ("cond_stage_model.model.transformer.resblocks.1.", "cond_stage_model.model.text_projection")
    unused = (*unused, "cond_stage_model.model.logit_scale")
    got, want = load_file(tmp_path / "back.safetensors"), load_file(folder / "sd2.safetensors")
    for key in want:
        assert torch.equal(got[key], torch.zeros_like(want[key]) if key.startswith(unused) else want[key]), key
    assert StableDiffusion.load(tmp_path / "folder").config.schedule.prediction == "v"


def test_a_pickle_with_all_that_a_trainer_leaves_becomes_the_model_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.checkpoints.recognise.SD15", SMALL_SD1)  # the file does not say what it is
    StableDiffusion(SMALL_SD1).save(tmp_path / "want.safetensors", torch.bfloat16)
    tensors = load_file(tmp_path / "want.safetensors")
    averages = {f"model_ema.{k[6:].replace('.', '')}": v + 1 for k, v in tensors.items() if k.startswith("model.")}
    tables = {"betas": torch.zeros(1000), "model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(1000)}
    state = {"state_dict": tensors | averages | tables, "optimizer_states": [{"state": torch.ones(5)}], "epoch": 3}
    torch.save(state, tmp_path / "base.ckpt")
    assert run(tmp_path / "base.ckpt", "--out", tmp_path / "plain.safetensors") == 0
    assert_same(tmp_path / "plain.safetensors", tmp_path / "want.safetensors")
    assert run(tmp_path / "base.ckpt", "--ema", "--out", tmp_path / "ema.safetensors") == 0
    ema = load_file(tmp_path / "ema.safetensors")
    assert ema.keys() == tensors.keys()
    for key in tensors:
        assert torch.equal(ema[key], tensors[key] + 1 if key.startswith("model.") else tensors[key])


def test_a_mixture_of_precisions_keeps_every_bit(folder, tmp_path):
    want = load_file(folder / "base.safetensors")
    mixed = {key: value.half() if key.startswith("model.") else value for key, value in want.items()}
    save_file(mixed, tmp_path / "mixed.safetensors", metadata(folder / "base.safetensors"))
    assert run(tmp_path / "mixed.safetensors", "--out", tmp_path / "out.safetensors") == 0
    got = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(got[key], mixed[key].float()) for key in want)


def test_a_whole_file_is_taken_apart(folder, tmp_path, capsys):
    whole = folder / "whole.safetensors"
    assert "--part control" in error(capsys, whole, "--out", tmp_path / "out.safetensors")
    for part in ("base", "control"):
        assert run(whole, "--part", part, "--out", tmp_path / f"{part}.safetensors") == 0
        assert_same(tmp_path / f"{part}.safetensors", folder / f"{part}.safetensors")
    assert run(whole, "--part", "both", "--dtype", "bf16", "--out", tmp_path / "both.safetensors") == 0
    both, want = load_file(tmp_path / "both.safetensors"), load_file(whole)
    assert both.keys() == want.keys() and all(torch.equal(both[key], want[key].bfloat16()) for key in want)


def test_a_difference_and_back(folder, tmp_path, capsys):
    control, base = folder / "control.safetensors", folder / "base.safetensors"
    difference = tmp_path / "difference.safetensors"
    assert run(control, "--difference", "--base", base, "--out", difference) == 0
    assert "difference" in load_file(difference)
    assert "--base" in error(capsys, difference, "--out", tmp_path / "back.safetensors")
    assert run(difference, "--base", base, "--out", tmp_path / "back.safetensors") == 0
    back, own = load_file(tmp_path / "back.safetensors"), load_file(control)
    assert back.keys() == own.keys() and "difference" not in back
    for key in own:
        torch.testing.assert_close(back[key], own[key], rtol=1e-6, atol=1e-6)


def test_pooling_is_written_down(folder, tmp_path):
    out = tmp_path / "shuffle.safetensors"
    assert run(folder / "control.safetensors", "--global-average-pooling", "--out", out) == 0
    control = ControlNet.load(out, small_sd(SMALLEST).unet)
    assert control.config == ControlConfig(global_average_pooling=True)
    assert run(out, "--out", tmp_path / "folder") == 0
    assert ControlNet.load(tmp_path / "folder", small_sd(SMALLEST).unet).config == control.config
    whole = (folder / "whole.safetensors", "--part", "both", "--global-average-pooling")
    assert run(*whole, "--out", tmp_path / "whole.safetensors") == 0
    assert run(tmp_path / "whole.safetensors", "--part", "control", "--out", tmp_path / "again.safetensors") == 0
    assert ControlNet.load(tmp_path / "again.safetensors", small_sd(SMALLEST).unet).config == control.config


# ------------------------------------------------------------------------------------------------------- the result


def test_nothing_is_replaced_without_force(folder, tmp_path, capsys):
    base, out = folder / "base.safetensors", tmp_path / "out.safetensors"
    out.write_text("precious")
    assert "--force" in error(capsys, base, "--out", out)
    assert out.read_text() == "precious"
    assert run(base, "--out", out, "--force") == 0
    assert_same(out, base)
    run(base, "--out", tmp_path / "folder")
    assert "--force" in error(capsys, base, "--dtype", "fp16", "--out", tmp_path / "folder")
    assert StableDiffusion.load(tmp_path / "folder").config == SMALLEST
    assert run(base, "--dtype", "fp16", "--out", tmp_path / "folder", "--force") == 0
    assert load_file(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors")["quant_conv.bias"].dtype == torch.half
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out.safetensors"]


def test_a_folder_of_something_else_is_never_replaced(folder, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_text("precious")
    (tmp_path / "photos/config.json").write_text('{"columns": 4}')
    assert "not replaced" in error(capsys, folder / "base.safetensors", "--out", tmp_path / "photos", "--force")
    assert (tmp_path / "photos/me.jpg").read_text() == "precious"


def test_a_model_can_be_converted_in_place(folder, tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes((folder / "base.safetensors").read_bytes())
    assert run(path, "--dtype", "fp32", "--out", path, "--force") == 0
    assert_same(path, folder / "base.safetensors")


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_a_stop_leaves_nothing(folder, tmp_path, monkeypatch, capsys, out):
    import ldm.checkpoints.save

    def stop(tensors, path, metadata):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(ldm.checkpoints.save, "save_file", stop)
    assert run(folder / "base.safetensors", "--out", tmp_path / out) == 130
    assert not list(tmp_path.iterdir())
    if out == "out":  # nor is the model lost that was to be replaced
        monkeypatch.undo()
        run(folder / "base.safetensors", "--out", tmp_path / out)
        monkeypatch.setattr(ldm.checkpoints.save, "save_file", stop)
        assert run(folder / "sd2.safetensors", "--out", tmp_path / out, "--force") == 130
        assert StableDiffusion.load(tmp_path / out).config == SMALLEST
        assert [path.name for path in tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("way_back", [True, False])
def test_a_failed_swap_brings_the_old_folder_back_or_leaves_it_beside(tmp_path, monkeypatch, way_back):
    (tmp_path / "model").mkdir()
    old = '{"_class_name": "ControlNetModel"}'
    (tmp_path / "model/config.json").write_text(old)
    replace_file = cli.os.replace

    def fail(source, target):
        if source.name == "new" or (target.name == "model" and not way_back):
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(cli.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt), cli.written(tmp_path / "model", force=True) as new:
        new.mkdir()
        (new / "config.json").write_text("new")
    (left,) = tmp_path.iterdir()
    assert (left.name == "model") == way_back and (left / "config.json").read_text() == old


def test_another_autoencoder_goes_into_the_result(folder, tmp_path, monkeypatch):
    """The base by its name in weights/; what nobody reads stays behind."""
    base, vae, expected = load_file(folder / "base.safetensors"), {}, load_file(folder / "base.safetensors")
    for key in [key for key in base if key.startswith("first_stage_model.")]:
        vae[key.removeprefix("first_stage_model.")] = expected[key] = base.pop(key) + 1
    described = metadata(folder / "base.safetensors")
    save_file(base | {"embedding_manager.x": torch.zeros(1)}, tmp_path / "mine.safetensors", described)
    save_file(vae, tmp_path / "vae.safetensors")
    save_file(expected, tmp_path / "expected.safetensors")
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", tmp_path)
    assert run("mine", "--vae", tmp_path / "vae.safetensors", "--out", tmp_path / "out.safetensors") == 0
    assert_same(tmp_path / "out.safetensors", tmp_path / "expected.safetensors")


def test_zero_terminal_snr_is_written_down(tmp_path):
    StableDiffusion(replace(SMALLEST, schedule=ScheduleConfig("v"))).save(tmp_path / "base.safetensors")
    assert run(tmp_path / "base.safetensors", "--zero-snr", "--out", tmp_path / "out.safetensors") == 0
    assert StableDiffusion.load(tmp_path / "out.safetensors").config.schedule.zero_terminal_snr


# ------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_converted(folder, tmp_path, capsys):
    base, control, out = folder / "base.safetensors", folder / "control.safetensors", tmp_path / "out.safetensors"
    assert "does not exist" in error(capsys, tmp_path / "none.ckpt", "--out", out)
    assert "only safetensors are written" in error(capsys, base, "--out", tmp_path / "out.ckpt")
    assert "--base" in error(capsys, control, "--difference", "--out", out)
    assert "no place in diffusers" in error(capsys, control, "--difference", "--base", base, "--out", tmp_path / "f")
    sd2 = folder / "sd2.safetensors"
    assert "another architecture" in error(capsys, control, "--difference", "--base", sd2, "--out", out)
    assert "moving average" in error(capsys, base, "--ema", "--out", out)
    assert "holds no ControlNet" in error(capsys, base, "--part", "control", "--out", out)
    assert "not a base model" in error(capsys, control, "--part", "base", "--out", out)
    assert "one file" in error(capsys, folder / "whole.safetensors", "--part", "both", "--out", tmp_path / "f")
    save_file({"lora_unet_up.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "a LoRA" in error(capsys, tmp_path / "lora.safetensors", "--out", out)
    assert "unknown architecture" in error(capsys, stripped(control, tmp_path), "--out", out)
    assert "--ema does not go with a ControlNet" in error(capsys, control, "--ema", "--out", out)
    assert "--vae does not go with a ControlNet" in error(capsys, control, "--vae", base, "--out", out)
    assert "--base does not go with a base" in error(capsys, base, "--base", base, "--out", out)
    (tmp_path / "file").write_text("")
    assert "not a folder that you may write to" in error(capsys, base, "--out", tmp_path / "file/out.safetensors")
    assert not out.exists()


def stripped(path, tmp_path):
    """A file without its description."""
    save_file(load_file(path), tmp_path / "stripped.safetensors")
    return tmp_path / "stripped.safetensors"


def test_debug_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path / "none.ckpt", "--out", tmp_path / "out.safetensors", "--debug")


def test_a_folder_is_not_replaced_by_what_lacks_some_of_its_files(folder, tmp_path, capsys):
    """Neither what else lies in it, nor a base by a ControlNet."""
    base, control, out = folder / "base.safetensors", folder / "control.safetensors", tmp_path / "model"
    run(control, "--out", out)
    (out / "loras").mkdir()
    (out / "loras/ink.safetensors").write_text("precious")
    assert "lost (loras/ink.safetensors): move" in error(capsys, control, "--out", out, "--force")
    assert "lost (config.json, diffusion_pytorch_model.safetensors, loras" in error(
        capsys, base, "--out", out, "--force"
    )
    assert (out / "loras/ink.safetensors").read_text() == "precious" and [*tmp_path.iterdir()] == [out]
    (out / "loras/ink.safetensors").unlink()
    assert run(control, "--out", out, "--force") == 0
