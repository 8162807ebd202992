"""infer.py and tools.merge with LoRAs and embeddings: the same image by every way, and again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SMALLEST, assert_same, small_sd
from written import write_small_lora

import infer
from controlnet.common.images import save_png
from ldm import StableDiffusion
from ldm.checkpoints.open import open_checkpoint
from ldm.config import ScheduleConfig
from ldm.embeddings import with_embeddings
from tools import merge


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of a folder like weights/: a small base, the LoRA "ink" and the embedding "thing"."""
    folder = tmp_path_factory.mktemp("files")
    sd = small_sd(SMALLEST)
    sd.config = replace(sd.config, name="tiny")
    sd.save(folder / "tiny.safetensors")
    write_small_lora(folder / "ink.safetensors", SMALLEST)
    save_file(
        {"emb_params": torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}, folder / "thing.safetensors"
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def weights(files, tmp_path, monkeypatch):
    """weights/ in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", folder)
    return folder


def image(*arguments):
    """The pixels that a run of infer.py makes; into a.png unless it says otherwise."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options = {"--steps": "1", "--device": "cpu", "--out": "a.png"} | options
    if "--again" in options:
        del options["--steps"]
    assert infer.main([argument for pair in options.items() for argument in pair]) == 0
    return np.asarray(Image.open(options["--out"]))


def error(capsys, *arguments):
    capsys.readouterr()
    assert infer.main(list(arguments)) == 2
    return capsys.readouterr().err.splitlines()[-1]


def texts_of(path):
    with Image.open(path) as found:
        return json.loads(found.text["controlnet"]), found.text["parameters"]


def test_a_lora_by_every_way_makes_the_same_image(weights):
    want = image("--prompt", "a red bird", "--lora", "ink:0.7")
    settings, text = texts_of("a.png")
    assert settings["lora"] == ["ink:0.7"] and {"tiny", "ink"} == settings["files"].keys()
    assert text.startswith("a red bird <lora:ink:0.7>\n")

    tagged = image("--prompt", "a red <lora:ink:0.7>bird", "--out", "b.png")
    settings, text = texts_of("b.png")
    assert settings["prompt"] == "a red <lora:ink:0.7>bird" and {"tiny", "lora:ink"} == settings["files"].keys()
    assert text.startswith("a red <lora:ink:0.7>bird\n")

    assert merge.main(["--base", "tiny", "--lora", "ink:0.7", "--out", "merged.safetensors"]) == 0
    merged = image("--prompt", "a red bird", "--base", "merged.safetensors")
    plain = image("--prompt", "a red bird")
    none = image("--prompt", "a red bird", "--lora", "ink:0")
    assert all(np.array_equal(other, want) for other in (tagged, merged, image("--again", "b.png")))
    assert np.array_equal(none, plain) and not np.array_equal(plain, want)


def test_again_wants_the_same_lora_and_finds_it_beside_the_image(weights, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (weights / "ink.safetensors").rename(tmp_path / "there" / "pen.safetensors")
    want = image("--lora", "there/pen.safetensors:-0.5", "--out", "there/a.png")
    assert infer.main(["--again", "there/a.png", "--out", "b.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("b.png")), want)
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    with Image.open("elsewhere/a.png") as found:
        text = found.text["controlnet"].replace("there/pen", "pen")
    save_png(Image.fromarray(want), "elsewhere/b.png", {"controlnet": text})
    assert np.array_equal(image("--again", "elsewhere/b.png"), want)
    assert texts_of("a.png")[0]["lora"] == [f"{tmp_path / 'elsewhere' / 'pen.safetensors'}:-0.5"]
    tensors = {name: value + 1 for name, value in load_file("elsewhere/pen.safetensors").items()}
    save_file(tensors, "elsewhere/pen.safetensors")
    assert "is no longer the file that the image was made with" in error(capsys, "--again", "elsewhere/b.png")


def test_an_embedding_is_a_word_of_the_prompt(weights, tmp_path, capsys):
    want = image("--prompt", "a (thing:1.2), red", "--negative", "embedding:thing")
    assert texts_of("a.png")[0]["files"].keys() == {"tiny", "embedding:thing"}
    assert np.array_equal(image("--again", "a.png", "--out", "b.png"), want)
    (weights / "thing.safetensors").rename(tmp_path / "thing.safetensors")
    assert 'there is no embedding "thing"' in error(capsys, "--again", "a.png")
    given = ("--prompt", "a (thing:1.2), red", "--negative", "thing", "--embedding", "thing.safetensors")
    assert np.array_equal(image(*given, "--out", "b.png"), want)
    assert np.array_equal(image("--again", "b.png"), want)
    assert not np.array_equal(image("--prompt", "a (thing:1.2), red", "--negative", "thing"), want)


def test_vectors_count_as_tokens(capsys):
    assert infer.main(["--prompt", "a " * 74 + "thing", "--steps", "1", "--device", "cpu", "--size", "64"]) == 0
    assert 'the prompt is too long, its end is ignored: "thing"' in capsys.readouterr().err


def test_a_base_is_merged_in_fp32_and_keeps_its_type(weights, capsys):
    small_sd(SMALLEST).save(weights / "half.safetensors", torch.float16)
    half = str(weights / "half.safetensors")
    assert merge.main(["--base", half, "--lora", "ink:0.7", "--lora", "ink:-0.2", "--out", "merged.safetensors"]) == 0
    want = StableDiffusion.load(half, loras=["ink:0.7", "ink:-0.2"])
    assert want.loras == ("ink", "ink")
    merged = open_checkpoint("merged.safetensors")
    assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.float16}
    assert_same(StableDiffusion.load("merged.safetensors", dtype=torch.float16), want.half())
    assert merge.main(["--base", "tiny", "--lora", "ink", "--dtype", "fp16", "--out", "other.safetensors"]) == 0
    want = StableDiffusion.load("tiny", loras=["ink"]).half()
    assert_same(StableDiffusion.load("other.safetensors", dtype=torch.float16), want)
    capsys.readouterr()
    for arguments in (["--lora", "ink"], ["a", "--base", half, "--lora", "ink"]):
        assert merge.main([*arguments, "--out", "b.safetensors"]) == 2
        assert "--lora changes a base: give --base, and neither" in capsys.readouterr().err


def test_what_a_base_lacks_is_in_what_is_merged(weights, capsys):
    """An autoencoder, and a word about what it predicts."""
    small_sd(SMALLEST).save(weights / "v.safetensors")
    bare = {k: v for k, v in load_file(weights / "v.safetensors").items() if not k.startswith("first_stage_model.")}
    save_file(bare, "bare.safetensors", {"config": json.dumps(replace(SMALLEST, schedule=ScheduleConfig()).to_dict())})
    options = ["--prediction", "v", "--zero-snr", "--vae", "v", "--lora", "ink"]
    assert merge.main(["--base", "bare.safetensors", *options, "--out", "inked.safetensors"]) == 0
    made = StableDiffusion.load("inked.safetensors")
    assert made.config.schedule == ScheduleConfig("v", zero_terminal_snr=True)
    assert_same(made.vae, small_sd(SMALLEST).vae)
    for option in (["--zero-snr"], ["--vae", "v"]):
        assert merge.main(["a", "b", *option, "--out", "b.safetensors"]) == 2
        assert "are for a base that LoRAs change" in capsys.readouterr().err


def test_in_python():
    sd = StableDiffusion.load("tiny", loras=["ink:0.7"])
    assert with_embeddings(sd, {"thing": torch.zeros(1, 16)}).loras == ("ink",)
