"""The command line: what it saves and prints, and what it says when something is wrong."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_control, small_sd

import infer
import ldm.stable_diffusion
from controlnet.generate import default_size, generate, make_hint
from controlnet.guidance import Control
from controlnet.images import read_image
from controlnet.model import ControlNet
from controlnet.worlds import draw_circle
from ldm import StableDiffusion
from ldm.config import SD15
from ldm.samplers import SAMPLERS
from ldm.unet import UNet

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder like weights/, with small random models in place of the trained ones."""
    folder = tmp_path_factory.mktemp("weights")
    sd = small_sd()
    control = small_control(sd)
    sd.config = replace(sd.config, name="tiny")
    sd.save(folder / "tiny.safetensors")
    control.save(folder / "tiny-fill50k.safetensors")
    sd.unet.decoder.conv_out.bias.fill_(torch.nan)
    sd.save(folder / "broken.safetensors")
    return folder


@pytest.fixture(autouse=True)
def place(weights, tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.setattr(ldm.stable_diffusion, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return infer.main(["--steps", "2", "--device", "cpu", *arguments])


def settings_of(path):
    with Image.open(path) as image:
        return json.loads(image.text["controlnet"])


def pixels_of(path):
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------------ pictures


def test_one_command_makes_a_picture_from_the_example_hint(weights, capsys):
    assert run("--hint", "circle.png", "--prompt", "red circle with blue background") == 0
    printed = capsys.readouterr()
    assert printed.out == "out/0001.png\n"
    assert '"circle.png" is not in this folder: taking the example in assets/\n' in printed.err

    sd = StableDiffusion.load(weights / "tiny.safetensors")
    image = read_image(ROOT / "assets" / "circle.png")
    net = ControlNet.load(weights / "tiny-fill50k.safetensors", sd.unet)
    control = Control(net, make_hint(image, default_size(sd.config, image)))
    (want,) = generate(sd, "red circle with blue background", [control], steps=2)
    assert np.array_equal(pixels_of("out/0001.png"), np.asarray(want))


def test_the_picture_carries_everything_used(weights):
    options = (
        "--negative blurry --seed 7 --sampler ddim --cfg 3 --eta 0.5 --size 96x64 --control-scale 0.8 --dtype bf16"
    )
    assert run("--prompt", "größer, bigger", "--hint", "circle.png", *options.split()) == 0
    assert pixels_of("out/0001.png").shape == (64, 96, 3)
    assert settings_of("out/0001.png") == {
        "prompt": "größer, bigger",
        "negative": "blurry",
        "seed": 7,
        "steps": 2,
        "sampler": "ddim",
        "cfg": 3.0,
        "eta": 0.5,
        "size": "96x64",
        "dtype": "bf16",
        "base": "tiny.safetensors",
        "controls": [{"control": "tiny-fill50k.safetensors", "hint": "circle.png", "scale": 0.8}],
    }
    with Image.open("out/0001.png") as image:
        assert image.text["parameters"] == (
            "größer, bigger\n"
            "Negative prompt: blurry\n"
            "Steps: 2, Sampler: DDIM, CFG scale: 3.0, Seed: 7, Size: 96x64, Model: tiny, Eta: 0.5, "
            'ControlNet 0: "Model: tiny-fill50k, Weight: 0.8"'
        )


def test_the_options_decide_over_the_picture():
    base = ["--hint", "circle.png", "--prompt", "a", "--out", "base.png"]
    assert run(*base) == 0
    for i, change in enumerate(
        [
            "--prompt b",
            "--negative b",
            "--seed 1",
            "--sampler ddpm",
            "--cfg 1",
            "--eta 1",
            "--control-scale 0",
            "--steps 3",
            "--dtype bf16",
        ]
    ):
        assert run(*base, *change.split(), "--out", f"{i}.png") == 0
        assert not np.array_equal(pixels_of(f"{i}.png"), pixels_of("base.png")), change


def test_the_default_guidance_is_saved_as_a_number(weights):
    assert run() == 0
    assert settings_of("out/0001.png")["cfg"] == 2.5


def test_every_picture_has_its_own_seed_and_number(capsys):
    assert run("--count", "2", "--seed", "5") == 0
    assert run("--seed", "6") == 0
    assert capsys.readouterr().out == "out/0001.png\nout/0002.png\nout/0003.png\n"
    assert [settings_of(f"out/000{i}.png")["seed"] for i in (1, 2, 3)] == [5, 6, 6]
    assert np.array_equal(pixels_of("out/0002.png"), pixels_of("out/0003.png"))
    assert not np.array_equal(pixels_of("out/0001.png"), pixels_of("out/0002.png"))


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
    assert [(c["hint"], c["scale"]) for c in settings["controls"]] == [("wide.png", 0.0), ("circle.png", 2.0)]
    assert run(*circle, "--control-scale", "2", "--size", "192x64") == 0
    assert np.array_equal(pixels_of("out/0002.png"), pixels_of("out/0001.png"))
    assert run(*wide, *circle, "--control-scale", "0.5") == 0
    assert [c["scale"] for c in settings_of("out/0003.png")["controls"]] == [0.5, 0.5]


def test_the_end_of_a_prompt_that_is_too_long_is_named(capsys):
    assert run("--prompt", "a " * 75 + "castle") == 0
    assert 'the prompt is too long, its end is ignored: "castle"' in capsys.readouterr().err
    assert run("--prompt", "a " * 75) == 0
    assert "too long" not in capsys.readouterr().err


def test_the_example_hint_is_a_circle_of_the_training_world():
    want = draw_circle(512, x=256, y=256, radius=144, disc="red", ground="blue").hint
    assert np.array_equal(pixels_of(ROOT / "assets" / "circle.png"), want)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options, message",
    [
        ("--base none.safetensors", '"none.safetensors" does not exist: give the path of a .safetensors file'),
        ("--base sd15", 'there is no file of "sd15" in '),
        ("--base text.png", '"text.png" is not readable as safetensors: '),
        ("--hint none.png", '"none.png" does not exist: give the path of a picture'),
        ("--hint text.png", '"text.png" is not readable as a picture '),
        ("--hint circle.png --control none", 'there is no ControlNet "none", neither as a file nor in '),
        ("--hint circle.png --control tiny", '"{weights}/tiny.safetensors" holds no ControlNet: it is a base model'),
        ("--hint circle.png --control sd15.safetensors", '"sd15.safetensors" does not fit, '),
        ("--control tiny-fill50k", "there are 0 --hint and 1 --control, expected one --control for each --hint"),
        ("--base text.png --hint circle.png", "there are 1 --hint and 0 --control, expected one"),
        (
            "--hint circle.png --control-scale 1 --control-scale 2",
            "there are 2 --control-scale and 1 --hint, expected one scale for all or for each",
        ),
        ("--size 100", "the picture's size is 100x100 (width x height), expected multiples of 32: take 96x96"),
        ("--hint circle.png --size 0", "the picture's size is 0x0 (width x height), expected multiples of 32: take 32"),
        ("--sampler euler", 'the sampler is "euler", expected one of ddim, ddpm, dpm++'),
        ("--steps 0", "the number of steps is 0, expected 1..1000"),
        ("--steps 1001", "the number of steps is 1001, expected 1..1000"),
        ("--eta 2", "eta is 2.0, expected 0 (deterministic) to 1"),
        ("--eta 1 --sampler dpm++", 'eta is 1.0, but sampler "dpm++" has no eta: '),
        ("--seed -1", f"the seed is -1, expected 0 to {2**63 - 1}: "),
        ("--device gpu", 'the device is "gpu", expected cpu, cuda, cuda:1 ... or mps'),
        ("--device cuda:99", 'there is no device "cuda:99" for this PyTorch, only cpu'),
        ("--out a.jpg", '--out is "a.jpg", expected a folder or the name of a file ending in .png'),
        ("--out text.png/a", '--out is "text.png/a", but "text.png" is a file, not a folder: give another'),
        (
            "--base {weights}/broken.safetensors",
            "the picture, computed in float32, has values that are not finite: take a lower",
        ),
    ],
)
def test_an_error_is_one_sentence_and_nothing_is_written(weights, place, capsys, options, message):
    (place / "text.png").write_text("not a picture")
    if "sd15.safetensors" in options:
        control_of_another_base(place / "sd15.safetensors")
    before = sorted(place.rglob("*"))
    assert run(*options.format(weights=weights).split()) == 2
    printed = capsys.readouterr()
    # The notice of the example hint is no error.
    (line,) = [line for line in printed.err.splitlines() if "taking the example" not in line]
    assert line.startswith("infer.py: " + message.format(weights=weights))
    assert printed.out == ""
    assert sorted(place.rglob("*")) == before


def control_of_another_base(path):
    unet = replace(SD15.unet, channels=16, multipliers=(1, 1, 1), attention=(False, True, True), blocks=1, groups=4)
    ControlNet(UNet(unet)).save(path)


@pytest.mark.parametrize(
    "options", ["--size 64y64", "--size -64", "--count 0", "--dtype int8", "--pormpt a", "--neg a"]
)
def test_options_that_make_no_sense_are_refused_by_the_parser(place, capsys, options):
    with pytest.raises(SystemExit) as caught:
        run(*options.split())
    assert caught.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert usage == "usage: python infer.py [options]" and options.split()[0] in line
    assert list(place.iterdir()) == []


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
    assert (done.returncode, done.stdout, done.stderr) == (0, "a.png\n", "")
    assert pixels_of("a.png").shape == (64, 64, 3)


def test_an_error_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", "--steps", "0"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "infer.py: the number of steps is 0, expected 1..1000\n"


def test_help_is_instant_and_lists_defaults_and_samplers():
    code = "import infer, sys; infer.parse_args([]); print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    text = process("--help").stdout
    assert ", ".join(SAMPLERS) in text and tuple(infer.A1111_SAMPLERS) == SAMPLERS
    assert "(default: tiny)" in text and "python infer.py --hint circle.png" in text
