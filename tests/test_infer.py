"""The command line: what it saves and prints, and what it says when something is wrong."""

import builtins
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SMALLEST, small_control, small_sd

import infer
from controlnet.common.image_files import read_image, read_mask
from controlnet.common.images import resized, save_png, to_hints, to_mask
from controlnet.common.program import said_if_slow
from controlnet.config import ControlConfig
from controlnet.guidance import MODES, Control
from controlnet.hints import detect, hint_file
from controlnet.hints.hint_image import HintImage
from controlnet.inference.generate import generate
from controlnet.inference.image_to_image import Init
from controlnet.inference.options import Options
from controlnet.inference.png_text import fingerprint
from controlnet.inference.run import check_prompts, prepare
from controlnet.inference.run import load as load_networks
from controlnet.inference.sampler_names import A1111_SAMPLERS, sampler_name
from controlnet.inference.sizes import default_size
from controlnet.inference.upscale import upscaled
from controlnet.model import ControlNet
from controlnet.worlds.fill50k import draw_circle
from ldm import StableDiffusion
from ldm.checkpoints.recognise import open_base
from ldm.config import PRESETS, SD15, TINY, ScheduleConfig
from ldm.fast.packed import pack
from ldm.samplers import SAMPLERS
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder like weights/, with small random models in place of the trained ones."""
    folder = tmp_path_factory.mktemp("weights")
    sd = small_sd(SMALLEST)
    control = small_control(sd)
    sd.config = replace(sd.config, name="tiny")
    sd.save(folder / "tiny.safetensors")
    control.save(folder / "tiny-fill50k.safetensors")
    sd.unet.decoder.conv_out.bias.fill_(1e38)
    sd.unet.decoder.conv_out.weight.fill_(1e38)
    sd.save(folder / "broken.safetensors")
    small_sd(SMALLEST).save(folder / "other.safetensors")
    return folder


@pytest.fixture(scope="module")
def loads():
    """Each network is loaded, and each base looked at, once for all tests: that takes longer than two steps."""
    opened = cache(lambda place, *given: open_base(*given))
    load_base, load_control = cache(StableDiffusion.load), cache(ControlNet.load)
    return {
        "controlnet.inference.run.open_base": lambda name, *given: opened(name == "tiny" or Path.cwd(), name, *given),
        "ldm.stable_diffusion.StableDiffusion.load": load_base,
        "controlnet.model.ControlNet.load": load_control,
    }


@pytest.fixture(autouse=True)
def place(weights, loads, tmp_path, monkeypatch):
    """An empty current folder."""
    for name, load in loads.items():
        monkeypatch.setattr(name, load)
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", weights)
    monkeypatch.setitem(PRESETS, "tiny", replace(SMALLEST, name="tiny"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return infer.main(["--steps", "2", "--device", "cpu", *arguments])


def by_hand(sd, prompt, controls=(), **settings):
    """One call, with the weights packed as infer.py packs them: they round otherwise."""
    pack(sd.unet, sd.vae, *(control.net for control in controls))
    return generate(sd, prompt, controls, **settings)


def notes(printed):
    """What is said on stderr, line by line, but for what others print there."""
    return [line for line in printed.err.splitlines() if "| " not in line and "step/s" not in line]


def photograph(size, seed=0):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def left_half(size):
    """White on the left."""
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    return image


def settings_of(path):
    with Image.open(path) as image:
        return json.loads(image.text["controlnet"])


def pixels_of(path):
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------------ images


def test_one_command_makes_an_image_from_the_example_hint(weights, capsys):
    assert run("--hint", "circle.png", "--prompt", "red circle with blue background") == 0
    printed = capsys.readouterr()
    assert printed.out == "out/0001.png\n"
    assert '"circle.png" is not in this folder: taking the example in assets/' in notes(printed)
    assert '"circle.png" is a hint of the kind "circles": taking --control tiny-fill50k' in notes(printed)

    sd = StableDiffusion.load(weights / "tiny.safetensors")
    image = read_image(ROOT / "assets" / "circle.png")
    net = ControlNet.load(weights / "tiny-fill50k.safetensors", sd.unet)
    control = Control(net, HintImage(image).at(default_size(sd.config, image)))
    (want,) = by_hand(sd, "red circle with blue background", [control], steps=2)
    assert np.array_equal(pixels_of("out/0001.png"), np.asarray(want))


def test_the_image_carries_everything_used(weights):
    options = (
        "--negative blurry --seed 7 --sampler ddim --cfg 3 --eta 0.5 --size 96x64 --control-scale 0.8 --precision bf16"
    )
    assert run("--prompt", "größer, bigger", "--hint", "circle.png", *options.split()) == 0
    assert pixels_of("out/0001.png").shape == (64, 96, 3)
    settings = settings_of("out/0001.png")
    files = settings.pop("files")
    assert settings == {
        "prompt": "größer, bigger",
        "negative": "blurry",
        "batch_size": 1,
        "seed": 7,
        "size": "96x64",
        "fit": "stretch",
        "init": None,
        "strength": None,
        "mask": None,
        "mask_blur": 0.0,
        "only_masked": None,
        "base": "tiny",
        "prediction": None,
        "zero_snr": False,
        "vae": None,
        "lora": [],
        "embedding": [],
        "clip_skip": 1,
        "upscale": 1.0,
        "upscale_strength": 0.5,
        "tile_diffusion": False,
        "long_prompts": False,
        "steps": 2,
        "sampler": "ddim",
        "cfg": 3.0,
        "eta": 0.5,
        "reuse": 1,
        "device": "cpu",
        "precision": "bf16",
        "compile": False,
        "low_memory": False,
        "hint": ["circle.png"],
        "detect": ["none"],
        "control": ["tiny-fill50k"],
        "control_scale": [0.8],
        "control_layers": [None],
        "control_start": [0.0],
        "control_end": [1.0],
        "control_mask": [None],
        "control_mode": ["balanced"],
    }
    assert files == {
        "tiny": fingerprint(weights / "tiny.safetensors"),
        "circle.png": fingerprint(ROOT / "assets" / "circle.png"),
        "tiny-fill50k": fingerprint(weights / "tiny-fill50k.safetensors"),
    }
    with Image.open("out/0001.png") as image:
        assert image.text["parameters"] == (
            "größer, bigger\n"
            "Negative prompt: blurry\n"
            "Steps: 2, Sampler: DDIM, CFG scale: 3.0, Seed: 7, Size: 96x64, Model: tiny, Eta: 0.5, "
            'ControlNet 0: "Module: none, Model: tiny-fill50k, Weight: 0.8, Resize Mode: Just Resize, '
            'Guidance Start: 0.0, Guidance End: 1.0, Pixel Perfect: False, Control Mode: Balanced"'
        )


def test_the_options_decide_over_the_image():
    left_half((64, 64)).save("left.png")
    photograph((64, 64)).save("photo.png")
    base = ["--hint", "circle.png", "--control", "fill50k", "--prompt", "a", "--out", "base.png"]
    assert run(*base) == 0
    for i, change in enumerate(
        [
            "--prompt (a:1.5)",
            "--control-start 0.5",
            "--control-end 0.5",
            "--control-mask left.png",
            "--control-layers 1,1,1,1,0",
            "--init photo.png",
            "--init photo.png --mask left.png",
            "--detect invert",
            "--prompt b",
            "--negative b",
            "--seed 1",
            "--sampler ddpm",
            "--cfg 1",
            "--eta 1",
            "--control-scale 0",
            "--steps 3",
            "--reuse 2",
            "--precision bf16",
        ]
    ):
        assert run(*base, *change.split(), "--out", f"{i}.png") == 0
        assert not np.array_equal(pixels_of(f"{i}.png"), pixels_of("base.png")), change


@pytest.mark.parametrize(
    "device, given, used", [("cuda", None, "fp16"), ("mps", None, "fp32"), ("cuda", "fp32", "fp32")]
)
def test_the_precision_is_fp16_on_cuda_unless_another_is_given(weights, device, given, used, monkeypatch, capsys):
    monkeypatch.setattr("controlnet.inference.run.use_device", lambda name: torch.device(device))
    monkeypatch.setattr("controlnet.inference.memory.free_memory", lambda device: None)
    (job,) = prepare(Options(precision=given), {})
    assert job.settings(0)["precision"] == used
    said = [line for line in notes(capsys.readouterr()) if "fp16" in line]
    assert said == (["computing in fp16 (--precision fp32: slower and exact)"] if used == "fp16" else [])


def test_unet_and_controls_are_laid_out_for_the_device_and_the_autoencoder_is_not(monkeypatch):
    """With --low-memory, so that they wait on the CPU."""
    laid_out, cuda = [], torch.device("cuda")
    monkeypatch.setattr("controlnet.inference.run.lay_out", lambda *given: laid_out.append(given))
    monkeypatch.setattr("controlnet.inference.run.use_device", lambda name: cuda)
    monkeypatch.setattr("controlnet.inference.memory.free_memory", lambda device: None)
    sd, (job,) = load_networks(prepare(Options(precision="fp32", low_memory=True, hint=["circle.png"]), {}))
    ((networks, *how),) = laid_out
    assert how == [cuda, "fp32"] and {*networks} == {sd.unet, job.controls[0].net}


def test_the_precision_recorded_is_what_was_computed_in(weights, capsys):
    assert run("--precision", "tf32") == 0 and run("--dtype", "fp32") == 0
    assert notes(capsys.readouterr()) == ["cpu has no TF32: computing in fp32"]
    assert [settings_of(f"out/000{i}.png")["precision"] for i in (1, 2)] == ["fp32", "fp32"]


def test_the_default_guidance_is_saved_as_a_number(weights):
    assert run() == 0
    assert settings_of("out/0001.png")["cfg"] == 2.5


def test_every_image_has_its_own_seed_and_number(capsys):
    assert run("--count", "2", "--seed", "5") == 0
    assert run("--seed", "6") == 0
    assert capsys.readouterr().out == "out/0001.png\nout/0002.png\nout/0003.png\n"
    assert [settings_of(f"out/000{i}.png")["seed"] for i in (1, 2, 3)] == [5, 6, 6]
    assert np.array_equal(pixels_of("out/0002.png"), pixels_of("out/0003.png"))
    assert not np.array_equal(pixels_of("out/0001.png"), pixels_of("out/0002.png"))


def test_images_of_a_batch_are_saved_with_their_seeds_and_its_size(capsys):
    """The last batch is what is left."""
    options = ["--seed", "5", "--eta", "1", "--sampler", "ddim"]
    assert run("--count", "3", "--batch-size", "2", *options) == 0
    assert run("--count", "3", *options) == 0
    assert capsys.readouterr().out.split() == [f"out/000{i}.png" for i in range(1, 7)]
    made = [settings_of(f"out/000{i}.png") for i in range(1, 7)]
    assert [one["seed"] for one in made] == [5, 6, 7] * 2
    assert [one["batch_size"] for one in made] == [2, 2, 1] + [1] * 3
    for i in (1, 2, 3):
        assert np.abs(pixels_of(f"out/000{i}.png").astype(int) - pixels_of(f"out/000{i + 3}.png")).max() <= 1
    assert np.array_equal(pixels_of("out/0003.png"), pixels_of("out/0006.png"))


def test_an_image_of_a_batch_is_made_again_alone_or_with_its_batch(capsys):
    options = ["--hint", "circle.png", "--sampler", "ddpm"]
    assert run("--count", "2", "--batch-size", "2", "--seed", "3", *options) == 0
    capsys.readouterr()
    said = '"out/0001.png" is made alone, not in a batch of 2: it is the same to rounding'
    assert infer.main(["--again", "out/0001.png", "--out", "alone.png"]) == 0
    assert said in notes(capsys.readouterr()) and settings_of("alone.png")["batch_size"] == 1
    assert np.abs(pixels_of("alone.png").astype(int) - pixels_of("out/0001.png")).max() <= 1
    assert infer.main(["--again", "out/0001.png", "--count", "2", "--out", "both.png"]) == 0
    assert said not in notes(capsys.readouterr())
    for i in (1, 2):
        assert np.array_equal(pixels_of(f"both-{i}.png"), pixels_of(f"out/000{i}.png"))


def test_a_seed_is_drawn_said_and_recorded(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("secrets.randbelow", lambda end: end - 1)  # after which there is one for each image
        assert run("--seed", "-1", "--count", "2") == 0
    assert run("--seed", "-1") == 0
    said = [int(line.removeprefix("the seed is ")) for line in notes(capsys.readouterr())]
    seeds = [settings_of(f"out/000{i}.png")["seed"] for i in (1, 2, 3)]
    assert seeds == [said[0], said[0] + 1, said[1]] and said[0] != said[1]
    assert run("--seed", str(seeds[1])) == 0
    assert np.array_equal(pixels_of("out/0002.png"), pixels_of("out/0004.png"))


@pytest.mark.parametrize(
    "ours, names",
    [
        ("ddim", "DDIM|DDIMScheduler"),
        ("ddpm", "Ddpm|DDPMScheduler"),
        ("dpm++", "DPM++|DPM++ 2M|dpm++ 2m|dpmpp_2m|DPMSolverMultistepScheduler"),
        ("dpm++-karras", "DPM++ 2M Karras|dpmpp_2m_karras|dpm++-karras|k_dpmpp_2m_karras"),
        ("dpm++-sde", "DPM++ SDE|dpmpp_sde|DPMSolverSDEScheduler"),
        ("dpm++-sde-karras", "DPM++ SDE Karras"),
        ("euler", "Euler|EulerDiscreteScheduler|k_euler"),
        ("euler-a", "Euler a|euler_ancestral|k_euler_a|EulerAncestralDiscreteScheduler|eulera"),
        ("heun", "Heun|HeunDiscreteScheduler"),
        ("unipc", "UniPC|uni_pc|uni_pc_bh2|UniPCMultistepScheduler"),
        ("lcm", "LCM|LCMScheduler"),
    ],
)
def test_samplers_have_the_names_of_many_programs(ours, names):
    assert [sampler_name(name) for name in [ours, *names.split("|")]] == [ours] * (2 + names.count("|"))
    assert [sampler_name(name) for name in ("DPM++ 2M SDE", "ddim karras", "", "k")] == [
        "DPM++ 2M SDE",
        "ddim karras",
        "",
        "k",
    ]


@pytest.mark.parametrize("name", ["Euler a", "DPM++ SDE Karras", "LCM"])
def test_a_sampler_of_another_program_makes_its_images_again(name):
    assert run("--sampler", name, "--seed", "3", "--steps", "3") == 0
    assert settings_of("out/0001.png")["sampler"] == sampler_name(name)
    assert infer.main(["--again", "out/0001.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("out/0001.png"))
    assert run("--sampler", name, "--seed", "2", "--steps", "3", "--count", "2", "--out", "two.png") == 0
    assert np.array_equal(pixels_of("two-2.png"), pixels_of("out/0001.png"))


def test_a_second_pass_goes_with_no_mask(place, capsys):
    photograph((64, 64)).save("photo.png")
    left_half((64, 64)).save("left.png")
    assert run("--init", "photo.png", "--mask", "left.png", "--upscale", "2") == 2
    assert "--upscale makes all of the image anew, also what a mask keeps" in capsys.readouterr().err
    assert run("--init", "photo.png", "--size", "32", "--upscale", "2", "--out", "a.png") == 0
    assert pixels_of("a.png").shape == (64, 64, 3) and settings_of("a.png")["size"] == "32x32"


def test_a_large_image_in_tiles_is_the_second_pass_of_a_small_one(weights, capsys):
    """With the hint made at both sizes: circle.png has 512 pixels."""
    settings = ["--hint", "circle.png", "--size", "64", "--tile-diffusion", "--seed", "3"]
    assert run(*settings, "--upscale", "1.5", "--upscale-strength", "0.6") == 0
    assert infer.main(["--again", "out/0001.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("out/0001.png"))
    sd = StableDiffusion.load(weights / "tiny.safetensors")
    net = ControlNet.load(weights / "tiny-fill50k.safetensors", sd.unet)
    control, given = Control.from_image(net, ROOT / "assets" / "circle.png"), dict(steps=2, seed=3, tile_diffusion=True)
    pack(sd.unet, sd.vae, net)
    images = generate(sd, "", [control], size=(64, 64), **given)
    (want,) = upscaled(sd, images, 1.5, "", [control], strength=0.6, **given)
    assert np.array_equal(pixels_of("out/0001.png"), np.asarray(want)) and want.size == (96, 96)
    assert infer.main(["--again", "out/0001.png", "--upscale", "1", "--out", "small.png"]) == 0
    assert np.array_equal(pixels_of("small.png"), np.asarray(images[0]))


@pytest.mark.parametrize("prompt", ["-red", "-", "--prompt=--red", "-1"])
def test_a_prompt_may_begin_with_a_dash(prompt):
    assert run(*([prompt] if "=" in prompt else ["--prompt", prompt]), "--negative", "-blue, --size 9") == 0
    settings = settings_of("out/0001.png")
    assert (settings["prompt"], settings["negative"]) == (prompt.removeprefix("--prompt="), "-blue, --size 9")


def test_each_hint_of_a_folder_makes_its_images_with_one_model(place, monkeypatch, capsys):
    (place / "hints").mkdir()
    for name, size in {"b.png": (64, 64), "a.png": (96, 64)}.items():
        photograph(size).save(place / "hints" / name)
    load, loaded = ControlNet.load, []
    monkeypatch.setattr(ControlNet, "load", lambda *names, **options: loaded.append(names) or load(*names, **options))
    options = ["--control", "circles", "--count", "2", "--save-hint"]
    assert run("--hint", "hints", *options) == 0
    assert capsys.readouterr().out.split() == [f"out/000{i}.png" for i in (1, 2, 3, 4)] and len(loaded) == 1
    made = [settings_of(f"out/000{i}.png") for i in (1, 2, 3, 4)]
    assert [(one["hint"], one["seed"], one["size"]) for one in made] == [
        (["hints/a.png"], 0, "96x64"),
        (["hints/a.png"], 1, "96x64"),
        (["hints/b.png"], 0, "64x64"),
        (["hints/b.png"], 1, "64x64"),
    ]
    assert np.array_equal(pixels_of("out/0003-hint.png"), pixels_of("hints/b.png"))
    assert run("--hint", "hints/b.png", *options, "--out", "b.png") == 0
    assert np.array_equal(pixels_of("b-2.png"), pixels_of("out/0004.png"))


def test_a_folder_goes_on_after_its_highest_number(place):
    (place / "mine").mkdir()
    for name in ("0007.png", "holiday.png"):
        (place / "mine" / name).write_bytes(b"mine")
    assert run("--out", "mine") == 0
    assert sorted(path.name for path in (place / "mine").iterdir()) == ["0007.png", "0008.png", "holiday.png"]
    assert (place / "mine" / "0007.png").read_bytes() == b"mine"


def test_a_named_file_is_replaced_and_that_is_said(place, capsys):
    assert run("--out", "new/a.png") == 0
    assert "replaced" not in capsys.readouterr().err
    before = (place / "new" / "a.png").read_bytes()
    assert run("--out", "new/a.png", "--seed", "1") == 0
    printed = capsys.readouterr()
    assert printed.out == "new/a.png\n" and "new/a.png is replaced" in printed.err
    assert (place / "new" / "a.png").read_bytes() != before
    assert run("--out", "new/b.png", "--count", "2") == 0
    assert sorted(path.name for path in (place / "new").iterdir()) == ["a.png", "b-1.png", "b-2.png"]


def test_hints_and_controls_go_in_pairs(weights, place):
    Image.new("RGB", (300, 100), "white").save(place / "wide.png")
    wide = ["--hint", "wide.png", "--control", "tiny-fill50k"]
    circle = ["--hint", "circle.png", "--control", str(weights / "tiny-fill50k.safetensors")]
    assert run(*wide, *circle, "--control-scale", "0", "--control-scale", "2") == 0
    settings = settings_of("out/0001.png")
    assert settings["size"] == "192x64"  # the first hint's shape, the second is resized to it
    assert (settings["hint"], settings["control_scale"]) == (["wide.png", "circle.png"], [0.0, 2.0])
    assert run(*circle, "--control-scale", "2", "--size", "192x64") == 0
    assert np.array_equal(pixels_of("out/0002.png"), pixels_of("out/0001.png"))
    assert run(*wide, *circle, "--control-scale", "0.5") == 0
    assert settings_of("out/0003.png")["control_scale"] == [0.5, 0.5]


def test_hints_of_one_control_share_it(monkeypatch):
    load, loaded = ControlNet.load, []
    monkeypatch.setattr(ControlNet, "load", lambda *names, **options: loaded.append(options) or load(*names, **options))
    circles = ["--hint", "circle.png", "--control", "circles"] * 2
    assert run(*circles) == 0 and len(loaded) == 1
    assert run(*circles, "--control-mode", "shuffle", "--control-mode", "balanced") == 0 and len(loaded) == 3


def test_the_end_of_a_prompt_that_is_too_long_is_named(capsys):
    assert run("--prompt", "a " * 75 + "castle") == 0
    assert 'the prompt is too long, its end is ignored: "castle"' in capsys.readouterr().err
    assert run("--prompt", "a " * 75) == 0
    assert "too long" not in capsys.readouterr().err


def test_what_other_programs_would_do_with_a_prompt_is_said_not_to_be_done(capsys):
    options = Options(prompt="a [red:blue:0.5] {cat|dog}", negative="[fog | rain] AND (snow:1.2) [mist]")
    check_prompts(options, Tokenizer(TINY.text))
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("in a prompt: ")[2] for line in said] == ["[red:blue:0.5], {cat|dog}", "[fog | rain], AND"]
    check_prompts(Options(prompt=r"a [cat] and \[a|b], 10:30"), Tokenizer(TINY.text))
    assert "instructions" not in capsys.readouterr().err


def test_the_example_hint_is_a_circle_of_the_training_world():
    want = draw_circle(512, x=256, y=256, radius=144, disc="red", ground="blue").hint
    assert np.array_equal(pixels_of(ROOT / "assets" / "circle.png"), want)


# ------------------------------------------------------------------------------------------------------------ again


EVERYTHING = (
    "--prompt|(größer:1.3), a: b|--negative|[blurry]|--hint|photo.png|--detect|canny|--control|fill50k"
    "|--hint|circle.png|--control|fill50k|--control-scale|0.8|--control-scale|0.5|--control-layers|1,1,0.5,1,1|--control-end|0.6"
    "|--control-mode|guess|--control-mode|balanced|--control-mask|left.png|--init|photo.png|--strength|0.7|--mask"
    "|left.png|--sampler|ddpm|--steps|5|--reuse|2|--cfg|3|--seed|7|--size|96x64|--long-prompts|--low-memory"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("everything")


@pytest.fixture
def everything(place, made):
    """Made once: the other tests get copies."""
    if not any(made.iterdir()):
        photograph((64, 64)).save("photo.png")
        left_half((64, 64)).save("left.png")
        assert run(*EVERYTHING.split("|"), "--count", "2", "--out", "first.png") == 0
        shutil.copytree(place, made, dirs_exist_ok=True)
    shutil.copytree(made, place, dirs_exist_ok=True)


def again(*arguments):
    return infer.main(["--again", "first-2.png", *arguments])


def test_an_image_is_made_again_to_the_bit(everything, capsys):
    capsys.readouterr()
    assert again("--out", "again.png") == 0
    assert capsys.readouterr().out == "again.png\n"
    assert np.array_equal(pixels_of("again.png"), pixels_of("first-2.png"))
    with Image.open("again.png") as one, Image.open("first-2.png") as other:
        assert one.text == other.text
    assert not np.array_equal(pixels_of("first-1.png"), pixels_of("first-2.png"))


def test_an_image_without_hints_is_made_again(place):
    assert run("--prompt", "a circle", "--out", "first-2.png") == 0
    assert again("--out", "again.png") == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("first-2.png"))


def test_other_options_change_what_is_made_again(everything):
    assert again("--hint", "circle.png", "--control", "fill50k", "--detect", "none", "--control-scale", "2") == 2
    assert again("--seed", "7", "--out", "one.png") == 0
    assert np.array_equal(pixels_of("one.png"), pixels_of("first-1.png"))


def test_a_file_that_is_another_by_now_is_said(everything, capsys):
    photograph((64, 64), seed=1).save("photo.png")
    assert again() == 2
    assert '"photo.png" is no longer the file that the image was made with' in capsys.readouterr().err


def test_only_images_made_here_are_made_again(place, capsys):
    photograph((8, 8)).save("photo.png")
    (place / "text.png").write_text("no image")
    save_png(photograph((8, 8)), "old.png", {"controlnet": '{"prompt": "a"}'})
    for name, message in {
        "old.png": '"old.png" was made by another version of infer.py, which did not know negative, size',
        "photo.png": '"photo.png" does not say how it was made',
        "text.png": '"text.png" is not readable as an image',
        "none.png": '"none.png" is not readable as an image',
    }.items():
        assert infer.main(["--again", name]) == 2
        assert message in capsys.readouterr().err


def test_strange_settings_are_refused(everything, capsys):
    """No traceback, whatever another program may have written under our name."""
    settings = settings_of("first-2.png")
    for name, value in {
        "steps": "many",
        "clip_skip": 1.5,
        "size": 5.5,
        "low_memory": "no",
        "seed": None,
        "cfg": True,
        "precision": "int8",
        "control_mode": ["strong", "balanced"],
        "control_start": [[0.5], {}],
        "hint": "photo.png",
        "files": None,
    }.items():
        save_png(photograph((8, 8)), "first-2.png", {"controlnet": json.dumps({**settings, name: value})})
        assert again() == 2
        said = "the mode of a control" if name == "control_mode" else f'"{name}"'
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_prompt_that_is_no_unicode_is_kept_and_read_again(place):
    assert run("--prompt", "caf\udcff", "--out", "first-2.png") == 0
    assert settings_of("first-2.png")["prompt"] == "caf\udcff"
    assert again("--out", "again.png") == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("first-2.png"))


def test_an_image_from_before_an_option_and_its_name_is_made_again(everything):
    settings = settings_of("first-2.png")
    for name in ("batch_size", "compile", "embedding", "fit", "lora", "mask_blur", "only_masked", "vae", "zero_snr"):
        del settings[name]
    settings["dtype"] = settings.pop("precision")
    save_png(photograph((8, 8)), "old.png", {"controlnet": json.dumps(settings)})
    assert infer.main(["--again", "old.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("first-2.png"))


def test_another_autoencoder_is_recorded_and_taken_again(weights, place, capsys):
    tensors = load_file(weights / "tiny.safetensors")
    vae = {key: tensors.pop(key) for key in list(tensors) if key.startswith("first_stage_model.")}
    save_file(tensors, place / "without.safetensors", {"config": json.dumps(SMALLEST.to_dict())})
    vae["first_stage_model.decoder.conv_out.bias"] += 0.5
    save_file(vae, place / "vae.safetensors")
    assert run("--base", "without.safetensors") == 2
    assert "it has no autoencoder" in (said := capsys.readouterr().err) and "give one with --vae FILE" in said
    assert run("--out", "own.png") == run("--vae", "vae.safetensors", "--out", "other.png") == 0
    assert run("--base", "without.safetensors", "--vae", "vae.safetensors", "--out", "first-2.png") == 0
    assert settings_of("first-2.png")["files"]["vae.safetensors"] == fingerprint(place / "vae.safetensors")
    assert again("--out", "again.png") == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("other.png"))
    assert not np.array_equal(pixels_of("again.png"), pixels_of("own.png"))


def test_zero_terminal_snr_is_said_for_a_base_that_does_not_tell(place, capsys):
    """As if its file told."""
    sd = small_sd(SMALLEST)
    tells = SMALLEST.schedule
    for name, schedule in {"mute": ScheduleConfig("v"), "eps": ScheduleConfig("eps"), "tells": tells}.items():
        sd.config = replace(sd.config, schedule=schedule)
        sd.save(place / f"{name}.safetensors")
    assert run("--base", "mute.safetensors", "--zero-snr", "--out", "first-2.png") == 0
    assert run("--base", "tells.safetensors", "--out", "told.png") == 0
    assert run("--base", "mute.safetensors", "--out", "untold.png") == again("--out", "again.png") == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("told.png"))
    assert not np.array_equal(pixels_of("again.png"), pixels_of("untold.png"))
    assert run("--base", "eps.safetensors", "--zero-snr") == 2
    assert "leave out --zero-snr, or say --prediction v if it does" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- again: which files


def move(place, *names):
    (place / "elsewhere").mkdir()
    for name in names:
        (place / name).rename(place / "elsewhere" / name)


def test_an_image_is_made_again_from_another_folder_with_the_files_beside_it(everything, place, capsys):
    move(place, "first-2.png", "photo.png", "left.png")
    assert infer.main(["--again", "elsewhere/first-2.png", "--out", "again.png"]) == 0
    said = '"elsewhere/first-2.png" names these files: tiny, fill50k, photo.png, circle.png, left.png'
    assert said in notes(capsys.readouterr())
    assert np.array_equal(pixels_of("again.png"), pixels_of("elsewhere/first-2.png"))


@pytest.mark.parametrize("missing, option", [("photo.png", "hint"), ("left.png", "mask")])
def test_other_files_are_opened_only_if_one_says_so(everything, place, capsys, missing, option):
    (moved,) = {"photo.png", "left.png"} - {missing}
    move(place, "first-2.png", moved)
    before = sorted(place.rglob("*"))
    again = ["--again", "elsewhere/first-2.png", "--out", "again.png"]
    assert infer.main(again) == 2
    *_, named, line = notes(capsys.readouterr())
    assert "names these files: tiny, fill50k, photo.png" in named
    assert line == (
        f'infer.py: "elsewhere/first-2.png" names "{missing}" for --{option}, which is neither in weights/ or assets/ '
        f"nor beside it: give --{option} yourself, or add --trust if you know the file"
    )
    assert sorted(place.rglob("*")) == before
    assert infer.main([*again, "--trust"]) == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("elsewhere/first-2.png"))


def test_a_file_that_is_given_needs_no_trust(place):
    photograph((64, 64)).save("photo.png")
    assert run("--init", "photo.png", "--out", "first-2.png") == 0
    move(place, "first-2.png")
    assert infer.main(["--again", "elsewhere/first-2.png"]) == 2
    assert infer.main(["--again", "elsewhere/first-2.png", "--init", "photo.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels_of("again.png"), pixels_of("elsewhere/first-2.png"))


@pytest.mark.parametrize("option", ["base", "control", "hint", "init", "mask", "control_mask"])
@pytest.mark.parametrize(
    "name", ["{place}/secret.png", "../secret.png", "sub/../../secret.png", "secret.png", "a" * 5000, "/etc/passwd"]
)
def test_a_strange_image_opens_nothing(everything, place, capsys, monkeypatch, option, name):
    move(place, "first-2.png", "photo.png", "left.png")
    photograph((64, 64)).save("secret.png")
    settings, name = settings_of("elsewhere/first-2.png"), name.format(place=place)
    settings[option] = [name, name] if isinstance(settings[option], list) else name
    save_png(photograph((8, 8)), "elsewhere/first-2.png", {"controlnet": json.dumps(settings)})
    opened, plain = [], builtins.open
    monkeypatch.setattr(
        "builtins.open", lambda file, *rest, **more: opened.append(str(file)) or plain(file, *rest, **more)
    )
    assert infer.main(["--again", "elsewhere/first-2.png"]) == 2
    assert f"give --{option.replace('_', '-')} yourself" in capsys.readouterr().err.splitlines()[-1]
    assert not [file for file in opened if "secret" in file or "passwd" in file]


@pytest.mark.parametrize("option, name", [("hint", "secr*"), ("hint", "secrets"), ("control", "secrets")])
def test_a_strange_image_opens_no_folder_and_no_pattern(everything, place, capsys, option, name):
    """Of the current folder, where it does not lie itself: a folder of hints, or a training run."""
    move(place, "first-2.png", "photo.png", "left.png")
    (place / "secrets").mkdir()
    for file in ("secret.png", "secrets/secret.png"):
        photograph((64, 64)).save(file)
    (place / "secrets/settings.json").write_text("{}")
    settings = settings_of("elsewhere/first-2.png")
    settings[option] = [name, name]
    save_png(photograph((8, 8)), "elsewhere/first-2.png", {"controlnet": json.dumps(settings)})
    assert infer.main(["--again", "elsewhere/first-2.png"]) == 2
    assert f"give --{option} yourself" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["hint", "detect", "control_start", "control_scale", "lora", "embedding"])
def test_an_image_with_nothing_where_each_has_a_value_is_refused(everything, capsys, option):
    settings = {**settings_of("first-2.png"), option: [None]}
    save_png(photograph((8, 8)), "first-2.png", {"controlnet": json.dumps(settings)})
    assert again() == 2
    assert f'has nothing for one "{option}", expected a value for each' in capsys.readouterr().err


def test_too_many_hints_in_an_image_are_refused(everything, capsys):
    settings = settings_of("first-2.png")
    settings |= {name: settings[name][:1] * 33 for name, value in settings.items() if isinstance(value, list)}
    save_png(photograph((8, 8)), "first-2.png", {"controlnet": json.dumps(settings)})
    assert again() == 2
    assert "there are 33 --hint for one image, expected at most 32" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- again: A1111's


A1111 = (
    "a (red:1.3) bird, <lora:ink:0.8>\nNegative prompt: blurry\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, "
    "CFG scale: 4.5, Seed: 9, Size: 96x64, Model hash: 45dee52b, Model: tiny, Denoising strength: 0.5, Clip skip: 1, "
    'Hires upscale: 2, ControlNet 0: "Module: canny, Model: x"'
)


def test_an_image_of_a1111_is_made_again_as_far_as_it_tells(weights, capsys):
    save_png(photograph((8, 8)), "theirs.png", {"parameters": A1111})
    assert infer.main(["--again", "theirs.png", "--device", "cpu", "--out", "a.png"]) == 0
    said = capsys.readouterr().err
    assert "was not made by infer.py, whose noise differs: the image will be similar at best" in said
    assert "not taken from it: Model hash, ControlNet 0, LoRA ink" in said
    settings = settings_of("a.png")
    assert settings["base"] == str(weights / "tiny.safetensors")
    assert (settings["prompt"], settings["negative"]) == ("a (red:1.3) bird,", "blurry")
    assert [settings[name] for name in ("steps", "sampler", "cfg", "size")] == [3, "dpm++-karras", 4.5, "96x64"]
    assert (settings["upscale"], settings["upscale_strength"]) == (2, 0.5) and pixels_of("a.png").shape == (128, 192, 3)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"DPM++ 2M": "DPM fast"}, 'there is no sampler "DPM fast Karras" here: taking "ddim"'),
        ({"Model: tiny": "Model: ../../x"}, 'its model "../../x" is not in '),
        ({"Steps: 3": "Steps: many"}, "has 'many' for \"steps\""),
        ({"96x64": "97x64"}, "the image's size is 97x64 (width x height), expected multiples of 16"),
    ],
)
def test_what_an_image_of_a1111_says_of_things_that_are_not_here_is_said(capsys, changes, said):
    text = A1111
    for old, new in changes.items():
        text = text.replace(old, new)
    save_png(photograph((8, 8)), "theirs.png", {"parameters": text})
    infer.main(["--again", "theirs.png", "--device", "cpu"])
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed


# ------------------------------------------------------------------------------------------------------------ controls


def test_the_mode_of_a_control_is_its_layers_and_branch(weights):
    """By hand, for each mode: the same image from `generate`."""
    sd = StableDiffusion.load(weights / "tiny.safetensors")
    image = read_image(ROOT / "assets" / "circle.png")
    hint = HintImage(image).at(default_size(sd.config, image))
    powers = [0.825**i for i in reversed(range(5))]
    for mode, layers, prompt_only in [
        ("guess", powers, True),
        ("resolution", [0.5, 0.5, 1, 1, 1], True),
        ("resolution-literal", [1, 1, 2, 2, 2], True),
        ("middle", [0, 0, 0, 0, 1], False),
        ("prompt", [1] * 5, True),
    ]:
        assert run("--hint", "circle.png", "--control-mode", mode, "--out", f"{mode}.png") == 0
        net = ControlNet.load(weights / "tiny-fill50k.safetensors", sd.unet)
        (want,) = by_hand(sd, "", [Control(net, hint, 1.0, layers, prompt_only)], steps=2)
        assert np.array_equal(pixels_of(f"{mode}.png"), np.asarray(want)), mode
    assert run("--hint", "circle.png", "--guess", "--out", "g.png") == 0
    assert np.array_equal(pixels_of("g.png"), pixels_of("guess.png"))
    assert run("--hint", "circle.png", "--control-mode", "shuffle", "--out", "shuffle.png") == 0
    net = ControlNet.load(weights / "tiny-fill50k.safetensors", sd.unet, global_average_pooling=True)
    (want,) = by_hand(sd, "", [Control(net, hint, prompt_only=True)], steps=2)
    assert np.array_equal(pixels_of("shuffle.png"), np.asarray(want))


def test_a_hint_is_detected_at_the_images_size_and_saved(capsys):
    photograph((128, 96)).resize((640, 480)).save("photo.png")
    assert run("--hint", "photo.png", "--detect", "canny", "--control", "circles", "--save-hint") == 0
    assert "the hint is saved as out/0001-hint.png" in notes(capsys.readouterr())
    want = detect("canny", np.asarray(resized(read_image("photo.png"), (64, 80))))
    assert np.array_equal(pixels_of("out/0001-hint.png"), want) and want.any()
    plain = ["--hint", "out/0001-hint.png", "--control", "circles"]
    assert run(*plain) == 0
    assert np.array_equal(pixels_of("out/0002.png"), pixels_of("out/0001.png"))


def test_a_detector_has_options(capsys):
    photograph((12, 9)).resize((64, 64)).save("photo.png")
    hint = ["--hint", "photo.png", "--control", "circles", "--save-hint", "--out", "a.png", "--detect"]
    assert run(*hint, "canny:low=20,high=40") == 0
    want = detect("canny", np.asarray(read_image("photo.png")), low=20, high=40)
    assert np.array_equal(pixels_of("a-hint.png"), want)
    assert run(*hint, "canny") == 0 and not np.array_equal(pixels_of("a-hint.png"), want)
    assert run(*hint, "canny:lowest=3") == 2
    assert 'canny has no option "lowest=3", expected low=' in capsys.readouterr().err


def test_a_hint_of_another_shape_is_stretched_and_that_is_said(capsys):
    hint = ["--hint", "circle.png", "--control", "circles", "--size"]
    assert run(*hint, "96x64") == 0
    stretched = '"circle.png" is 512x512 (width x height): it is stretched to 96x64 (width x height), '
    assert f"{stretched}which --fit crop or pad avoids" in notes(capsys.readouterr())
    assert run("--init", str(ROOT / "assets" / "circle.png"), "--size", "96x64", "--strength", "0") == 0
    assert f'"{ROOT / "assets" / "circle.png"}" is 512x512' in capsys.readouterr().err
    assert run(*hint, "64") == 0
    assert "stretched" not in capsys.readouterr().err


def test_a_hint_that_acts_in_no_step_is_said(capsys):
    photograph((64, 64)).save("photo.png")
    for options, steps in {"--control-start 0.6 --control-end 0.9": 2, "--control-end 0.5 --strength 0": 0}.items():
        assert run("--hint", "circle.png", "--init", "photo.png", "--strength", "1", *options.split()) == 0
        assert f'"circle.png" acts in none of the {steps} steps, from 0' in capsys.readouterr().err
    assert run("--hint", "circle.png", "--control-end", "0.5") == 0
    second_pass = "--init photo.png --strength 0 --size 32 --upscale 2 --upscale-strength 1"
    assert run("--hint", "circle.png", *second_pass.split()) == 0
    assert "acts in none" not in capsys.readouterr().err


def test_the_inpaint_hint_is_minus_one_where_the_mask_is_white(weights):
    photograph((64, 64)).save("photo.png")
    left_half((64, 64)).save("left.png")
    assert run("--hint", "photo.png", "--detect", "inpaint", "--mask", "left.png", "--control", "circles") == 0
    sd = StableDiffusion.load(weights / "tiny.safetensors")
    hint = HintImage(read_image("photo.png")).at((64, 64)).clone()
    hint[..., :32] = -1
    net = ControlNet.load(weights / "tiny-fill50k.safetensors", sd.unet)
    (want,) = by_hand(sd, "", [Control(net, hint)], steps=2)
    difference = pixels_of("out/0001.png").astype(int) - np.asarray(want).astype(int)
    assert np.abs(difference).max() <= 1  # the two hints lie differently in memory, and so round differently


@pytest.mark.parametrize("channels", [1, 4])
def test_a_hint_has_as_many_channels_as_its_control(weights, channels):
    control = f"control{channels}.safetensors"
    sd = StableDiffusion.load(weights / "tiny.safetensors")
    net = ControlNet.from_unet(small_sd(SMALLEST).unet, ControlConfig(hint_channels=channels)).requires_grad_(False)
    for conv in (*net.zero_convs, net.hint_encoder.convs[-1]):
        conv.weight.fill_(0.1)
    net.save(control)
    stored = np.dstack([np.asarray(photograph((64, 64))), np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))])
    Image.fromarray(stored).save("photo.png")
    assert run("--hint", "photo.png", "--control", control, "--save-hint") == 0
    pixels = hint_file.read_hint("photo.png", channels)
    hint = to_hints([pixels])
    (want,) = by_hand(sd, "", [Control(ControlNet.load(control, sd.unet), hint)], steps=2)
    assert np.array_equal(pixels_of("out/0001.png"), np.asarray(want))
    with Image.open("out/0001-hint.png") as saved:
        assert np.array_equal(np.asarray(saved), stored if channels == 4 else pixels.repeat(3, axis=2))


# ------------------------------------------------------------------------------------------------------- images in


def test_an_init_and_its_mask_go_in(weights):
    photograph((200, 100)).save("photo.png")
    left_half((200, 100)).save("left.png")
    sd = StableDiffusion.load(weights / "tiny.safetensors")
    image, mask = read_image("photo.png"), read_mask("left.png")
    for options, init in {
        "": Init(image, 0.75),
        "--strength 0.4": Init(image, 0.4),
        "--mask left.png": Init(image, 1.0, mask),
        "--mask left.png --strength 0.5": Init(image, 0.5, mask),
    }.items():
        assert run("--init", "photo.png", *options.split(), "--steps", "4", "--out", "a.png") == 0
        (want,) = by_hand(sd, "", init=init, steps=4)
        assert want.size == (128, 64) and np.array_equal(pixels_of("a.png"), np.asarray(want)), options


def test_only_the_masked_part_is_made_and_put_back(weights, capsys):
    """With hint and control mask of the same view cut like it; without --only-masked a note says what changes."""
    whole, mask = photograph((300, 200)), Image.new("L", (300, 200))
    mask.paste(255, (200, 50, 250, 120))
    whole.save("photo.png")
    mask.save("mask.png")
    steered = Image.new("L", (600, 400))
    steered.paste(255, (0, 0, 450, 400))
    steered.save("left.png")
    options = ["--init", "photo.png", "--mask", "mask.png", "--hint", "photo.png", "--control", "circles"]
    assert run(*options, "--control-mask", "left.png", "--only-masked", "16", "--mask-blur", "2", "--out", "a.png") == 0
    assert "stretched" not in capsys.readouterr().err
    sd = StableDiffusion.load(weights / "tiny.safetensors")
    net = ControlNet.load(weights / "tiny-fill50k.safetensors", sd.unet)
    init = Init(whole, 1.0, mask, 2, 16)
    size = default_size(sd.config, init.part(whole))
    steers = to_mask(resized(init.part(steered, size), size))
    (want,) = by_hand(sd, "", [Control(net, HintImage(whole), mask=steers)], init=init, steps=2)
    made = pixels_of("a.png")
    assert made.shape == (200, 300, 3) and np.array_equal(made, np.asarray(want))
    kept = np.asarray(init.soft_mask) == 0
    assert np.array_equal(made[kept], np.asarray(whole)[kept]) and (made != np.asarray(whole))[~kept].any()
    assert infer.main(["--again", "a.png", "--out", "b.png"]) == 0 and np.array_equal(pixels_of("b.png"), made)
    capsys.readouterr()
    assert run(*options) == 0
    said = notes(capsys.readouterr())
    assert '"photo.png" is 300x200 (width x height): the image will be 96x64 (width x height); --only-masked' in str(
        said
    )


def test_strange_images_are_taken_as_a_person_expects():
    """As hint, init and mask in one: what counts is what one sees."""
    seen = left_half((64, 64)).convert("RGB")
    seen.save("seen.png")
    seen.convert("CMYK").save("cmyk.tiff")
    seen.convert("P").save("palette.gif")
    seen.save("moving.gif", save_all=True, append_images=[Image.new("RGB", (64, 64))])
    Image.fromarray(np.asarray(seen)[..., 0].astype(np.uint16) * 257).save("deep.png")
    seen.convert("1").save("bits.png")
    turned, exif = seen.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    turned.save("turned.png", exif=exif)
    alpha = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    alpha.paste((9, 9, 9, 0), (0, 0, 32, 64))
    alpha.save("alpha.png")

    def made(name, mask=None):
        options = ["--hint", name, "--control", "circles", "--init", name, "--mask", mask or name]
        options += ["--out", f"made-{name}.png"]
        assert run(*options, "--steps", "1") == 0
        return pixels_of(f"made-{name}.png")

    want = made("seen.png")
    for name in ("cmyk.tiff", "palette.gif", "moving.gif", "deep.png", "bits.png", "turned.png"):
        assert np.array_equal(made(name), want), name
    assert np.array_equal(made("alpha.png", mask="seen.png"), want)  # as a mask, what is painted would be white


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options, message",
    [
        ("--base none.safetensors", '"none.safetensors" does not exist: '),
        ("--base sd15", 'there is no file of "sd15" in '),
        ("--base text.png", '"text.png" is not readable as a checkpoint: '),
        ("--hint none.png", '"none.png" does not exist: give the path of an image'),
        ("--hint text.png", '"text.png" is not readable as an image'),
        ("--hint circle.png --control none", 'there is no ControlNet "none", neither as a file nor in '),
        ("--hint circle.png --control tiny", '"{weights}/tiny.safetensors" holds no ControlNet: it is a base model'),
        (
            "--hint circle.png --control sd15.safetensors",
            '"sd15.safetensors" is a ControlNet for SD 1.x, and your base is',
        ),
        ("--control tiny-fill50k", "there are 0 --hint and 1 --control, expected one --control for each --hint"),
        ("--base {weights}/other.safetensors --hint circle.png", 'there is no --control for the hint "circle.png", '),
        (
            "--hint circle.png --control-scale 1 --control-scale 2",
            "there are 2 --control-scale and 1 --hint, expected one for all or for each",
        ),
        ("--size 100", "the image's size is 100x100 (width x height), expected multiples of 16 up to 8192: take"),
        ("--hint circle.png --size 0", "the image's size is 0x0 (width x height), expected multiples of 16 up"),
        ("--sampler PLMS", 'the sampler is "PLMS", expected one of ddim, ddpm, dpm++'),
        ("--steps 0", "the number of steps is 0, expected 1..1000"),
        ("--steps 1001", "the number of steps is 1001, expected 1..1000"),
        ("--compile --reuse 2", "--compile and --reuse exclude each other: leave one of them out"),
        ("--compile --low-memory", "--compile and --low-memory exclude each other: leave one of them out"),
        ("--eta 2", "eta is 2.0, expected 0 (deterministic) to 1"),
        ("--upscale 0.9", "images are to become 0.9 times as large, expected 1 (as they are) to 8192"),
        ("--upscale 200", "the image's size is 12800x12800 (width x height), expected multiples of 16 up to 8192"),
        ("--upscale-strength 0.3", "there is an --upscale-strength without --upscale"),
        ("--eta 1 --sampler dpm++", 'eta is 1.0, but sampler "dpm++" has no eta: '),
        ("--cfg -3", "the guidance (cfg) is -3.0, expected 0 (the negative prompt alone), 1 (the prompt alone)"),
        (f"--count {2**64}", f"the number of images is {2**64}, more than there are seeds"),
        (f"--prompt (a:{10**50})", "a weight in the prompt is 1e+50, which is too large"),
        ("--seed -2", f"the seed is -2, expected 0 to {2**32 - 1}: "),
        ("--init left.png --only-masked", "only the masked part is to be made, but nothing is masked: give a mask"),
        ("--init left.png --mask-blur 4", "the mask is to be soft, but nothing is masked: give a mask"),
        ("--only-masked 4", "there is a --only-masked without --init: give the image that it is for, or leave it out"),
        ("--mask-blur 4", "there is a --mask-blur without --init: give the image that it is for, or leave it out"),
        ("--size 16384", "the image's size is 16384x16384 (width x height), expected multiples of 16 up to 8192"),
        (f"--prompt {'(' * 200}", "a prompt has more than 100 brackets inside each other"),
        ("--strength 0.5", "there is a --strength without --init"),
        ("--mask left.png", "there is a --mask without --init"),
        ("--init left.png --mask wide.png", "the mask is 96x32 (width x height), expected the image's 64x64"),
        ("--init left.png --mask black.png", 'the mask "black.png" is black everywhere: paint white'),
        ("--init text.png", '"text.png" is not readable as an image'),
        ("--hint left.png --detect inpaint", "--detect inpaint needs a --mask"),
        (
            "--hint left.png --detect inpaint --mask wide.png --control circles",
            '"left.png": the mask is 96x32 (width x height), expected the image',
        ),
        ("--hint left.png --detect edges", 'there is no detector "edges", expected canny, '),
        ("--hint left.png --detect none:low=1", 'there is no detector "none", expected canny, '),
        ("--hint left.png --detect inpaint: --mask left.png", "there is a --mask without --init"),
        ("--hint left.png --detect inpaint: --init left.png", 'there is no detector "inpaint", expected canny, '),
        (
            "--hint pose.json",
            f'"{ROOT}/assets/pose.json" is not an image: name the detector that reads it with detect: pose',
        ),
        (
            "--hint map.npy --detect canny",
            '"map.npy" is not an image: name the detector that reads it with detect: depth or normal ',
        ),
        (
            "--hint strip.png",
            '"strip.png": an image is 400x4 (width x height), expected at most 16 times as long as wide: crop it',
        ),
        ("--hint circle.png --control folder", '"folder" '),
        (
            "--hint left.png",
            '"left.png" looks like a gray image, which does not tell the small ControlNet that it is for: say ',
        ),
        ("--hint circle.png --control-layers 1,2", "a control has 2 layer weights, expected 5 for this base"),
        ("--hint circle.png --control-start 0.6 --control-end 0.5", "a control acts from 0.6 to 0.5 of the steps"),
        ("--hint circle.png --control-mask black.png", 'the mask "black.png" is black everywhere'),
        ("--hint circle.png --control-mode strong", 'the mode of a control is "strong", expected one of balanced, '),
        ("--control-scale 1", "there is a --control-scale without a --hint: give a --hint, or leave it out"),
        ("--clip-skip 2", "clip_skip is 2; this text model accepts 1 to 1"),
        ("--device gpu", 'the device is "gpu", expected cpu, cuda, cuda:1 ... or mps'),
        ("--device cuda:99", 'PyTorch finds no device "cuda:99" here, only cpu'),
        ("--out a.jpg", '--out is "a.jpg", expected a folder or the name of a file ending in .png'),
        ("--out a.TIFF", '--out is "a.TIFF", expected a folder or'),
        ("--hint *.png --out a.png", 'there are 5 hints, and --out "a.png" is one file: give a folder'),
        (f"--size 1{400 * '0'}", "a number is too large ("),
        ("--out text.png/a", '--out is "text.png/a", but "text.png" is a file, not a folder: give another'),
        (
            "--base {weights}/broken.safetensors",
            "unet.decoder.conv_out, computed in float32, gives values that are not finite: take a lower",
        ),
    ],
)
def test_an_error_is_one_sentence_and_nothing_is_written(weights, place, capsys, options, message):
    (place / "text.png").write_text("not an image")
    left_half((64, 64)).save("left.png")
    left_half((96, 32)).save("wide.png")
    Image.new("L", (64, 64)).save("black.png")
    Image.new("L", (400, 4)).save("strip.png")
    np.save("map.npy", np.ones((4, 4)))
    (place / "folder").mkdir()
    if "sd15.safetensors" in options:
        control_of_another_base(place / "sd15.safetensors")
    before = sorted(place.rglob("*"))
    assert run(*options.format(weights=weights).split()) == 2
    printed = capsys.readouterr()
    # The notice of the example hint is not an error.
    (line,) = [line for line in notes(printed) if "taking" not in line and "stretched" not in line]
    assert line.startswith("infer.py: " + message.format(weights=weights))
    assert printed.out == ""
    assert sorted(place.rglob("*")) == before


def control_of_another_base(path):
    levels = dict(multipliers=(1, 1, 1), attention=(False, True, True), heads=(2, 2, 2))
    unet = replace(SD15.unet, channels=16, blocks=1, groups=4, **levels)
    ControlNet(UNet(unet)).save(path)


@pytest.mark.parametrize(
    "options",
    [
        "--size 64y64",
        "--size -64",
        "--count 0",
        "--batch-size 0",
        "--reuse 0",
        "--precision int8",
        "--pormpt a",
        "--neg a",
        "--strength 1.1",
        "--control-start -0.1",
        "--control-scale nan",
        "--cfg inf",
        "--control-layers 1,a",
        "--clip-skip 0",
        "--guess --control-mode middle",
    ],
)
def test_options_that_make_no_sense_are_refused_by_the_parser(place, capsys, options):
    with pytest.raises(SystemExit) as caught:
        run(*options.split())
    assert caught.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert usage == "usage: python infer.py [options]" and options.split()[0] in line
    assert list(place.iterdir()) == []


def test_numbers_are_checked_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(StableDiffusion, "load", lambda *_, **__: pytest.fail("the weights are read"))
    for options in (
        "--steps 0",
        "--sampler plms",
        "--eta 2",
        "--seed -2",
        "--size 100",
        "--clip-skip 5",
        "--hint none.png",
        "--hint circle.png --control none",
        "--hint circle.png --control tiny",
        "--hint circle.png --control-layers 1",
        "--out a.jpg",
        "--device gpu",
    ):
        assert run(*options.split()) == 2


def test_too_little_memory_is_a_sentence_and_other_failures_are_not_hidden(monkeypatch, capsys):
    def fail_with(error):
        def load(*_, **__):
            raise error

        monkeypatch.setattr(StableDiffusion, "load", load)

    fail_with(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert run() == 2
    advice = "add --low-memory, --precision fp16, a smaller --size or --batch-size"
    assert notes(capsys.readouterr()) == [f"infer.py: out of memory: {advice}"]
    fail_with(RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run()


def test_a_size_that_does_not_fit_into_memory_is_refused_before_it_is_tried(monkeypatch, capsys):
    gigabytes = {}
    monkeypatch.setattr("controlnet.inference.memory.free_memory", lambda device: int(1e9 * gigabytes["free"]))
    monkeypatch.setattr(HintImage, "make", lambda *_: pytest.fail("the hint is made"))
    hint, size = ["--hint", "circle.png", "--control", "circles"], ["--size", "4096"]
    for free, options, message in (
        (0.5, [], "needs about 1.4 GB of memory, but 0.5 GB are free: give a smaller --size"),
        (1.0, [], "needs about 1.4 GB of memory, but 1.0 GB are free: add --low-memory or give a smaller --size"),
        (0.83, [], "needs about 1.4 GB of memory, but 0.8 GB are free: add --tile-diffusion or give a"),
        (0.7, ["--low-memory"], "needs about 0.8 GB of memory, but 0.7 GB are free: add --tile-diffusion or give a"),
        (0.5, ["--precision", "fp16"], "needs about 0.7 GB of memory, but 0.5 GB are free: add --low-memory or"),
        (3.0, hint, "needs about 3.2 GB of memory, but 3.0 GB are free: add --tile-diffusion or give a"),
    ):
        gigabytes["free"] = free
        assert run(*size, *options) == 2
        assert f"an image of 4096x4096 (width x height) {message}" in capsys.readouterr().err
    gigabytes["free"] = 3.3
    with pytest.raises(pytest.fail.Exception, match="the hint is made"):
        run(*size, *hint)
    assert "an image of 4096x4096 (width x height) takes long on a CPU" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert run() == 2
    (line,) = notes(capsys.readouterr())
    assert line == (
        'infer.py: no image can be saved as "out" (No space left on device): make room there, or give another --out'
    )


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    assert run("--count", "2") == 0
    assert notes(capsys.readouterr()) == []
    monkeypatch.setattr("controlnet.inference.progress.SECONDS_BETWEEN_LINES", 0)
    assert run("--count", "2") == 0
    lines = notes(capsys.readouterr())
    assert [line.split(", ")[0] for line in lines] == ["step 1 of 4", "step 2 of 4", "step 3 of 4"]
    assert all(re.search(r", about \d+\.\d minutes left$", line) for line in lines)


def test_loading_is_said_if_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr("infer.said_if_slow", partial(said_if_slow, seconds=0.01))
    load = StableDiffusion.load
    monkeypatch.setattr(StableDiffusion, "load", lambda *given, **named: time.sleep(0.2) or load(*given, **named))
    assert run("--base", "tiny") == 0
    assert notes(capsys.readouterr()) == ["loading tiny ..."]


def test_a_stop_is_a_sentence(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusion, "load", stop)
    assert run() == 130
    assert notes(capsys.readouterr())[-1] == "infer.py: stopped, the images listed above, if any, are saved"


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="the number of steps is 0"):
        run("--steps", "0", "--debug")


# ------------------------------------------------------------------------------------------------------------ process


def process(*arguments):
    """infer.py as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "infer.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_program_runs_from_any_folder(weights):
    done = process("--base", str(weights / "tiny.safetensors"), "--device", "cpu", "--steps", "1", "--out", "a.png")
    assert (done.returncode, done.stdout) == (0, "a.png\n") and "Traceback" not in done.stderr
    assert pixels_of("a.png").shape == (64, 64, 3)


def test_pytorch_that_is_not_installed_is_a_sentence():
    code = "import sys; sys.modules['torch'] = None; import infer; sys.exit(infer.main([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "torch" in line
    assert line.endswith("install what is needed with `pip install -r requirements.txt`")


def test_an_error_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", "--steps", "0"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
    assert caught.value.code == 2
    assert "infer.py: the number of steps is 0, expected 1..1000" in notes(capsys.readouterr())


def test_help_is_instant_and_lists_defaults_samplers_and_modes(capsys):
    code = "import infer, sys; infer.parse_args([]); print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    with pytest.raises(SystemExit):
        infer.main(["--help"])
    text = capsys.readouterr().out
    named = {name.removesuffix("-karras") for name in SAMPLERS}
    assert all(name in text for name in (*named, *MODES)) and tuple(A1111_SAMPLERS) == tuple(SAMPLERS)
    assert "(default: tiny)" in text and "python infer.py --hint circle.png" in text
