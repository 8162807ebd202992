"""Files: what is loaded is what was saved, in the memory it needs, and every file that does not fit says why."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from minis import relative
from reference import FIXTURES
from safetensors.torch import load_file, save_file
from small import SMALLEST, assert_same, error_of, small_control, small_sd
from torch.utils._python_dispatch import TorchDispatchMode
from written import CONTEXT_KEY, MINIS, empty_unet, file_of, load_mini, rewrite, write_minis

from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.key_maps import unet_map
from ldm.checkpoints.load import load_parts, without_weights
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import identify
from ldm.checkpoints.save import save_checkpoint
from ldm.config import PRESETS, SD15, SD21_BASE, TINY, UNetConfig
from ldm.fast.packed import pack
from ldm.unet import UNet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_minis(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def minis(folder):
    """The miniatures as loaded: tests do not change them."""
    return {name: load_mini(folder, name) for name in MINIS}


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("name", MINIS)
def test_a_loaded_model_computes_the_numbers_of_the_published_code(folder, minis, name):
    """Tensors of equal shape in each other's place would pass every other test."""
    model, style = minis[name], name.removeprefix("mini_")
    control = ControlNet.load(folder / f"{name}_control_only.safetensors", model.unet)
    g = load_file(FIXTURES / "forward.safetensors")
    x, t, context = (g[f"{style}/{key}"] for key in ("x", "t", "context"))
    with torch.no_grad():
        assert relative(model.unet(x, t, context), g[f"{style}/eps_nocontrol"]) < 2e-5
        residuals = control(x, t, context, g["sd1/hint"])
        assert relative(model.unet(x, t, context, residuals), g[f"{style}/eps_control"]) < 2e-5
        assert relative(model.encode(g["vae/image"], sample=False), 0.18215 * g["vae/mean"]) < 2e-5
        assert relative(model.decode(g["vae/decode_in_scaled"]), g["vae/decode_out"]) < 2e-5
        text = load_file(FIXTURES / f"{style}_text.safetensors")
        want = text["last_hidden_state" if style == "sd1" else "penultimate"]
        assert relative(model.text_encoder(text["ids"]), want) < 2e-5


@pytest.mark.parametrize("name", MINIS)
def test_saving_gives_back_the_same_file(folder, minis, tmp_path, name):
    original, model = load_file(folder / f"{name}_checkpoint.safetensors"), minis[name]
    model.save(tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    buffers = {key for key in original if "." not in key or key.endswith("position_ids")}
    assert saved.keys() == original.keys() - buffers
    assert all(torch.equal(saved[key], original[key]) and saved[key].dtype == torch.float32 for key in saved)

    again = StableDiffusion.load(tmp_path / "saved.safetensors")  # now the file says what it is
    assert again.config == MINIS[name]
    assert_same(again, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_and_in_memory(tmp_path, dtype):
    """Of a model of another depth."""
    model = small_sd(SMALLEST)
    model.save(tmp_path / "half.safetensors", dtype=dtype)
    assert {value.dtype for value in load_file(tmp_path / "half.safetensors").values()} == {dtype}
    for wanted in (torch.float32, dtype):
        again = StableDiffusion.load(tmp_path / "half.safetensors", dtype=wanted)
        assert {value.dtype for value in again.parameters()} == {wanted}
        state = model.state_dict()
        assert all(torch.equal(v, state[key].to(dtype).to(wanted)) for key, v in again.state_dict().items())
    small_control(model).save(tmp_path / "control.safetensors")
    control = ControlNet.load(tmp_path / "control.safetensors", again.unet)
    assert {value.dtype for value in control.parameters()} == {dtype}


def test_loaded_models_are_locked(minis):
    model = minis["mini_sd1"]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------ memory


def memory(name):
    """A line of what Linux says of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def measure_loading(path, results):
    """In fp16 and in fp32, whose peak is higher: bytes of the parameters, of what is the process's own, of the peak."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # no file is kept open for each tensor
    checkpoint, config = open_checkpoint(path), UNetConfig(channels=64)
    torch.ones(1000).half().sum()
    for dtype in (torch.float16, torch.float32):
        with without_weights():
            unet = UNet(config)
        before, own_before = memory("VmRSS"), memory("RssAnon")
        load_parts(checkpoint, [(unet, unet_map(config))], (), dtype)
        own = memory("RssAnon") - own_before
        for parameter in unet.parameters():
            parameter.detach().view(-1)[::64].sum()  # touches every page
        size = sum(p.numel() * p.element_size() for p in unet.parameters())
        results.put((size, own, memory("VmHWM") - before))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_the_memory_of_the_parameters(tmp_path):
    """Nothing is copied where the file has the wanted dtype; else one tensor at a time. 34 million parameters."""
    config, path = UNetConfig(channels=64), tmp_path / "unet.safetensors"
    with without_weights():
        state = UNet(config).state_dict()
    sources = unet_map(config).sources(state)
    save_file({sources[name].key: torch.full(value.shape, 0.5) for name, value in state.items()}, path)
    results = forked.CONTEXT.Queue()
    process = forked.start(measure_loading, path, results)
    for copied in (1.0, 0.0):
        size, own, peak = results.get(timeout=60)
        assert abs(own - copied * size) < 0.15 * size
        assert peak < 1.15 * size
    process.join()
    path.unlink()  # 137 MB


class MetaOperations(TorchDispatchMode):
    """The names of the operations whose result exists on the meta device only."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta:
            self.names.add(str(function))
        return result


@pytest.mark.parametrize("config", MINIS.values(), ids=MINIS)
def test_models_to_be_filled_compute_nothing(config):
    """Most operations on the meta device import PyTorch's decompositions first: a second and more."""
    with MetaOperations() as operations, without_weights():
        ControlNet(StableDiffusion(config).unet)
    cheap = {"aten.empty.memory_format", "aten.fill_.Scalar", "aten.zero_.default"}
    assert operations.names <= cheap | {"aten.clone.default", "aten.detach.default"}


# ------------------------------------------------------------------------------------------------------- recognition


def test_metadata_come_first_and_the_argument_before_them(tmp_path):
    metadata = {"config": json.dumps(TINY.to_dict())}
    checkpoint = open_checkpoint(file_of(tmp_path, {CONTEXT_KEY: (48, 128)}, metadata))
    assert identify(checkpoint).config == TINY
    assert identify(checkpoint, "x0").config == replace(TINY, schedule=replace(TINY.schedule, prediction="x0"))


def test_presets_are_found_in_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", tmp_path)
    for preset, name in {
        "sd15": "v1-5-pruned.safetensors",
        "sd21": "v2-1_768-ema-pruned.safetensors",
        "sd21-base": "v2-1_512-ema-pruned.safetensors",
        "tiny": "tiny.safetensors",
    }.items():
        message = error_of(find, preset)
        assert f"{preset}.safetensors" in message and ("download" in message or "tools.pretrain" in message)
        (tmp_path / name).touch()
        assert find(preset) == (tmp_path / name, PRESETS[preset])
    (tmp_path / "v1-5-pruned-emaonly.safetensors").touch()
    assert find("sd15")[0].name == "v1-5-pruned-emaonly.safetensors"
    # The published name of SD 2.1 base is as good as the preset's: it settles eps or v.
    assert find(tmp_path / "v2-1_512-ema-pruned.safetensors")[1] == SD21_BASE
    assert find(tmp_path / "other.safetensors") == (tmp_path / "other.safetensors", None)


# ------------------------------------------------------------------------------------------------------------ errors


def test_files_that_are_no_checkpoints(folder, tmp_path):
    data = (folder / "mini_sd1_control_only.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n"
    contents = {
        "truncated": (data[:-1], "incomplete or damaged, download or copy it again"),
        "cut in the header": (data[: 8 + header // 2], "incomplete or damaged, download or copy it again"),
        "empty": (b"", "the file of 0 bytes is incomplete"),
        "zip": (b"PK\x03\x04" + bytes(1000), "damaged, download or copy it again (it is not a complete zip archive"),
        "pickle": (pickle.dumps({"a": 1}), "a pickle that PyTorch did not write"),
        "pointer": (pointer, "git lfs pull"),
        "page": (b"<!DOCTYPE html><html>" + b" " * 1000, "it is a web page"),
        "page after blank lines": (b"\n\n <!DOCTYPE html><html>", "it is a web page"),
        "zeros": (bytes(4096), "zeros at its beginning: the download is unfinished"),
        "answer": (
            b"Invalid username or password.",
            'it is a text ("Invalid username or password."), such as a failed',
        ),
        "JSON with a brace": (
            b'{"code":{"message":"log in"}}',
            'it is a text ("{"code":{"message"',
        ),
        "another language": ("\ufeffZugriff verweigert für Gäste".encode(), '("Zugriff verweigert für Gäste")'),
        "xet": (b"# xet version 0\nfilesize = 4265146304\n", "git xet pull"),
        "page after many blank lines": (b"\r\n" * 99 + b"<html>" + b"x" * 9999, "it is a web page"),
        "YAML": (
            b"# ControlNet\nmodel:\n  target: cldm.cldm.ControlLDM\n",
            "a configuration in YAML: give the checkpoint",
        ),
        "config.json": (b'{\n  "_class_name": "UNet2DConditionModel"}', "give the folder it is in"),
        "packed": (b"\x1f\x8b\x08" + bytes(99), "it is a packed archive: unpack it"),
        "image": (b"\x89PNG\r\n" + bytes(99), "it is an image"),
        "JSON": (b'{"error":"Unauthorized",\n"message":"log in"}', "such as a failed download leaves: repeat it"),
        "text": (
            b"hello " * 1000,
            "it is another kind of file, expected a .safetensors, .ckpt, .pth or .bin checkpoint",
        ),
    }
    for name, (content, sentence) in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        message = error_of(open_checkpoint, path)
        assert str(path) in message and sentence in message, name
    assert 'none.safetensors" does not exist' in error_of(open_checkpoint, tmp_path / "none.safetensors")
    assert "`hf download stabilityai/sd-vae --local-dir FOLDER`" in error_of(open_checkpoint, "stabilityai/sd-vae")
    assert "it is a URL, so download the file" in error_of(open_checkpoint, "https://hub/a/b.safetensors")
    assert "is a folder" in error_of(StableDiffusion.load, tmp_path)


def test_unknown_sizes_and_metadata(folder, tmp_path):
    message = error_of(StableDiffusion.load, folder / "mini_sd1_checkpoint.safetensors")
    assert (
        "a context of width 64 and no architecture in its metadata: expected 768 (SD 1.x) or 1024 (SD 2.x)" in message
    )
    for config in ('{"name": "x", "unet": {"channels": 3, "depth": 3}}', json.dumps(UNBUILDABLE)):
        path = file_of(tmp_path, {CONTEXT_KEY: (320, 768)}, {"config": config})
        assert "in a way that this version does not know" in error_of(StableDiffusion.load, path)
    config = '{"unet": {"channels": 3}, "control": {"depth": 3}}'
    path = file_of(tmp_path, {"control_model.input_hint_block.0.weight": (1,)}, {"config": config})
    assert "in a way that this version does not know" in error_of(ControlNet.load, path, empty_unet(TINY))


UNBUILDABLE = TINY.to_dict() | {"schedule": {"timesteps": 10**10}}


@pytest.mark.parametrize(
    "config", ['{"colour": 1}', "no json", "[1]", '{"unet": {"block_out_channels": [320]}}', "[" * 9999]
)
def test_metadata_of_other_programs_are_passed_over(tmp_path, config):
    """ "config" is a common name."""
    path = file_of(tmp_path, {CONTEXT_KEY: (320, 768)}, {"config": config})
    assert identify(open_checkpoint(path)).config == SD15


def test_missing_unexpected_and_misshapen_keys_are_named(tmp_path):
    prefix = "model.diffusion_model."

    def change(tensors):
        for i in range(5):
            tensors[f"extra.{i}"] = torch.zeros(1)
        del tensors[prefix + "out.2.bias"]
        tensors[prefix + "out.0.bias"] = torch.zeros(7)

    path = tmp_path / "changed.safetensors"
    small_sd(SMALLEST).save(path)
    rewrite(path, change)
    message = error_of(StableDiffusion.load, path)
    assert "does not fit, it is damaged, or made for another architecture: " in message
    assert f"1 key missing ({prefix}out.2.bias)" in message
    assert "5 keys unexpected (extra.0, extra.1, extra.2, ...)" in message
    assert f"1 key misshapen ({prefix}out.0.bias is [7], expected [8])" in message


# ------------------------------------------------------------------------------------------------------------ saving


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    save_checkpoint(path, {"a": torch.ones(1)}, {})

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("ldm.checkpoints.save.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"a": torch.zeros(1)}, {})
    assert torch.equal(load_file(path)["a"], torch.ones(1))
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]


def test_saved_files_have_the_permissions_of_any_new_file(tmp_path):
    save_checkpoint(tmp_path / "file.safetensors", {"a": torch.ones(1)}, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "file.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_model_can_be_saved_over_the_file_it_was_loaded_from(minis, tmp_path):
    path = tmp_path / "model.safetensors"
    minis["mini_sd1"].save(path)
    model = StableDiffusion.load(path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save(path, dtype=torch.float16)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------- under one roof


@torch.no_grad()
def test_encode_and_decode(minis):
    model = minis["mini_sd1"]
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = model.encode(images, sample=False)
    assert torch.equal(mean, 0.18215 * model.vae.posterior(images).mean)
    assert mean.shape == (2, 4, 4, 6)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    sample = model.encode(images, torch.Generator().manual_seed(7))
    assert torch.equal(sample, 0.18215 * model.vae.posterior(images).sample(noise))
    assert model.decode(mean).shape == images.shape


def test_half_precision_takes_any_dtype():
    model = small_sd(SMALLEST).bfloat16()
    assert model.encode(torch.zeros(1, 3, 32, 32), sample=False).dtype == torch.bfloat16
    assert model.decode(torch.zeros(1, 4, 4, 4)).dtype == torch.bfloat16


def test_device_and_type_are_the_unets_also_when_it_is_packed():
    assert (small_sd(SMALLEST).half().device, small_sd(SMALLEST).half().dtype) == (torch.device("cpu"), torch.float16)
    model = small_sd(SMALLEST)
    pack(model.unet)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_gradients_pass_through_the_autoencoder():
    model, latents = small_sd(SMALLEST), torch.zeros(1, 4, 4, 4, requires_grad=True)
    model.decode(latents).sum().backward()
    assert latents.grad.abs().sum() > 0
