"""What is written into images, read by the rules of the programs that others read them with, and what is read."""

import json
import re
import time

import pytest
from PIL import Image

from controlnet.common.images import save_png
from controlnet.guidance import MODES
from controlnet.hints import DETECTORS, options_of
from controlnet.inference.a1111 import MODULES, parameters, read_parameters
from controlnet.inference.again import with_recorded
from controlnet.inference.png_text import LARGEST_TEXT, png_texts, read_texts
from controlnet.inference.sampler_names import A1111_SAMPLERS, sampler_name

SETTINGS = {
    "prompt": "a (red:1.3) bird",
    "negative": "blurry",
    "seed": 7,
    "size": "96x64",
    "fit": "stretch",
    "init": None,
    "strength": None,
    "mask": None,
    "mask_blur": 0.0,
    "only_masked": None,
    "upscale": 1.0,
    "upscale_strength": 0.5,
    "base": "weights/sd15.safetensors",
    "lora": [],
    "clip_skip": 1,
    "steps": 5,
    "sampler": "ddim",
    "cfg": 3.0,
    "eta": 0.0,
    "hint": ["bird.jpg"],
    "detect": ["none"],
    "control": ["control_v11p_sd15_canny.pth"],
    "control_scale": [1.0],
    "control_start": [0.0],
    "control_end": [1.0],
    "control_mode": ["balanced"],
}


def a1111(text):
    """By A1111's rules: lines up to "Negative prompt:", and a last line of at least three names and values, one with a
    comma, colon or end of line in JSON's quotes."""
    *lines, last = text.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3
    values = {name: json.loads(value) if value[:1] == value[-1:] == '"' else value for name, value in found}
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:start]), negative, values


def unit_of(text):
    """By the rules of its ControlNet extension: "name: value" between commas, of these names alone, each in its range;
    one error and the whole unit is dropped."""
    known = "Module Model Weight Resize_Mode Processor_Res Threshold_A Threshold_B Guidance_Start Guidance_End"
    values = {}
    for item in text.split(","):
        name, value = item.strip().split(": ")
        assert name.replace(" ", "_") in [*known.split(), "Pixel_Perfect", "Control_Mode"]
        values[name] = value
    assert 0 <= float(values["Weight"]) <= 2
    assert 0 <= float(values["Guidance Start"]) <= float(values["Guidance End"]) <= 1
    assert values["Resize Mode"] in ("Just Resize", "Crop and Resize", "Resize and Fill")
    modes = ("Balanced", "My prompt is more important", "ControlNet is more important")
    assert values["Control Mode"] in modes and values["Pixel Perfect"] in ("True", "False")
    assert int(values.get("Processor Res", "512")) == float(values.get("Processor Res", "512"))
    for threshold in ("Threshold A", "Threshold B"):
        float(values.get(threshold, "0"))
    return values


def unit(**changes):
    _, _, values = a1111(parameters(SETTINGS | changes))
    return unit_of(values["ControlNet 0"])


def test_the_parameters_are_read_by_the_rules_of_a1111():
    prompt, negative, values = a1111(parameters(SETTINGS))
    assert (prompt, negative) == ("a (red:1.3) bird", "blurry")
    del values["ControlNet 0"]
    assert values == {
        "Steps": "5",
        "Sampler": "DDIM",
        "CFG scale": "3.0",
        "Seed": "7",
        "Size": "96x64",
        "Model": "sd15",
        "Eta": "0.0",
    }


@pytest.mark.parametrize("name", ["a, b", "a: b", 'a"b', '"a', "a\nb", "größer", "a\\", "a, \\"])
def test_names_are_quoted_by_the_rules_of_a1111(name):
    assert a1111(parameters(SETTINGS | {"base": f"{name}.safetensors"}))[2]["Model"] == name
    assert unit(control=[f"{name}.pth"])["Model"] == re.sub("[,:\n]", " ", name).strip()


def test_inpainting_is_said_as_in_a1111():
    _, _, values = a1111(
        parameters(SETTINGS | {"init": "a.png", "strength": 0.7, "mask": "b.png", "mask_blur": 4.0, "only_masked": 32})
    )
    assert (
        values.items()
        >= {
            "Denoising strength": "0.7",
            "Mask blur": "4.0",
            "Inpaint area": "Only masked",
            "Masked area padding": "32",
        }.items()
    )


def test_detectors_are_the_extensions_modules_with_its_thresholds():
    assert unit(detect=["canny:low=50,high=150"]) == {
        "Module": "canny",
        "Model": "control_v11p_sd15_canny",
        "Weight": "1.0",
        "Resize Mode": "Just Resize",
        "Processor Res": "64",
        "Threshold A": "50.0",
        "Threshold B": "150.0",
        "Guidance Start": "0.0",
        "Guidance End": "1.0",
        "Pixel Perfect": "False",
        "Control Mode": "Balanced",
    }
    assert unit(detect=["MLSD:distance=0.2"]).items() >= {"Threshold A": "0.1", "Threshold B": "0.2"}.items()
    assert unit(detect=["blur"])["Module"] == "blur_gaussian"
    assert unit(detect=["depth:distance=true"])["Module"] == "none"  # a map is a hint for it
    assert unit(detect=["midas:device=cpu"])["Module"] == "depth_midas"
    for name, (_, *options) in MODULES.items():
        assert name == "inpaint" or options_of(name).keys() >= set(options)
    for name in [*DETECTORS, "inpaint", "none", "None", "Inpaint"]:
        assert "Module" in unit(detect=[name])


@pytest.mark.parametrize("scale, want", [(0.0, 0), (1.5, 1.5), (-1.0, 0), (7.0, 2)])
def test_no_unit_is_dropped_for_a_weight_that_the_extension_lacks(scale, want):
    assert float(unit(control_scale=[scale])["Weight"]) == want


def test_modes_and_fits_have_the_extensions_names():
    modes = {mode: unit(control_mode=[mode])["Control Mode"] for mode in MODES}
    assert modes["balanced"] == "Balanced" and modes["guess"] == "ControlNet is more important"
    assert [unit(fit=fit)["Resize Mode"] for fit in ("stretch", "crop", "pad")] == [
        "Just Resize",
        "Crop and Resize",
        "Resize and Fill",
    ]


def test_a_second_pass_is_said_as_in_a1111():
    text = parameters({**SETTINGS, "upscale": 2.0, "upscale_strength": 0.4})
    assert "Denoising strength: 0.4, Hires upscale: 2.0, Hires upscaler: Lanczos" in text
    settings, _ = read_parameters(text)
    assert (settings["upscale"], settings["upscale_strength"], settings.get("strength")) == ("2.0", "0.4", None)


def test_loras_of_options_are_named_as_a1111_names_them():
    settings = {**SETTINGS, "prompt": "a <lora:oil:0.5> bird", "lora": ["my/ink.safetensors:-0.8", "a:b<c"]}
    prompt, _, _ = a1111(parameters(settings))
    assert prompt == "a <lora:oil:0.5> bird <lora:ink:-0.8> <lora:a b c:1>"


# -------------------------------------------------------------------------------------------------------------- reading


def test_our_own_parameters_are_read_back():
    settings, others = read_parameters(parameters(SETTINGS))
    assert settings == {
        "prompt": "a (red:1.3) bird",
        "negative": "blurry",
        "steps": "5",
        "sampler": "DDIM",
        "cfg": "3.0",
        "seed": "7",
        "size": "96x64",
        "base": "sd15",
    }
    assert others.keys() == {"Eta", "ControlNet 0"}


@pytest.mark.parametrize("name", A1111_SAMPLERS)
def test_every_sampler_is_read_back(name):
    settings, others = read_parameters(parameters({**SETTINGS, "sampler": name}))
    assert sampler_name(settings["sampler"]) == name and "Schedule type" not in others


@pytest.mark.parametrize(
    "text, sampler",
    [
        ("Sampler: DPM++ 2M Karras", "dpm++-karras"),  # older versions
        ("Sampler: DPM++ SDE, Schedule type: Automatic", "dpm++-sde-karras"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler-a"),
        ("Sampler: Heun, Schedule type: Karras", "heun-karras"),
        ("Sampler: Heun, Schedule type: Beta", "heun"),
    ],
)
def test_samplers_of_a1111_with_their_schedules(text, sampler):
    settings, others = read_parameters(f"a\nSteps: 1, {text}, Seed: 3, Size: 64x64")
    assert sampler_name(settings["sampler"]) == sampler and others == (
        {"Schedule type": "Beta"} if "Beta" in text else {}
    )


@pytest.mark.parametrize(
    "text, prompt, negative, seed",
    [
        ("", "", "", None),
        ("a prompt alone", "a prompt alone", "", None),
        ("a\nb\nNegative prompt: c\nd\nSteps: 1, Sampler: Euler a, Seed: 3", "a\nb", "c\nd", "3"),
        ("Negative prompt: c\nSteps: 1, Sampler: x, Seed: 3", "", "c", "3"),
        ("\nSteps: 1, Sampler: x, Seed: 3", "", "", "3"),
        ('a\nSteps: 1, Lora hashes: "x: 1, Seed: 4", Model: "a, b", Seed: 3', "a", "", "3"),
        ("a: b, c: d", "a: b, c: d", "", None),
    ],
)
def test_a1111s_text_is_read_by_its_rules(text, prompt, negative, seed):
    settings, _ = read_parameters(text)
    assert (settings["prompt"], settings["negative"], settings.get("seed")) == (prompt, negative, seed)


@pytest.mark.parametrize("part", ["a", " ", "a: ", 'a: "', 'a:"\\', ",", "\n", "Negative prompt:", "a-b/"])
def test_a_long_text_is_read_in_no_time(part):
    text = part * (LARGEST_TEXT // 8 // len(part))
    started = time.process_time()
    read_parameters(text)
    assert time.process_time() - started < 2


def saved(path, texts):
    save_png(Image.new("RGB", (4, 4)), path, texts)
    return path


def test_an_image_has_both_texts(tmp_path):
    settings, text = read_texts(saved(tmp_path / "a.png", png_texts(SETTINGS)))
    assert settings == SETTINGS and text == parameters(SETTINGS)
    assert read_texts(saved(tmp_path / "b.png", {})) == (None, None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 90_000, "nested"),
        ('{"a":' * 2000 + "1" + "}" * 2000, "nested"),
        ("[1, 2]", "does not say how it was made"),
        ("7", "does not say how it was made"),
        ("{", "does not say how it was made"),
        (f'"{"a" * LARGEST_TEXT}"', "has a text of more than"),
    ],
    ids=lambda value: value[:8],
)
def test_strange_texts_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_texts(saved(tmp_path / "a.png", {"controlnet": text}))


def test_only_png_is_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("a.jpg", "b.png", "none.png"):
        with pytest.raises(ValueError, match="is not readable as an image"):
            read_texts(tmp_path / name)


def test_a_record_of_nothing_is_one_of_another_version(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"controlnet": "{}"})
    with pytest.raises(ValueError, match="was made by another version of infer.py, which did not know prompt"):
        with_recorded({"again": str(tmp_path / "a.png")})
