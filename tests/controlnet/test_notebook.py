"""What a notebook types: the three public names, controls from any image, previews, and errors in a sentence."""

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL, small_control, small_sd

import controlnet
from controlnet import Control, ControlNet, generate
from controlnet.common.image_files import read_image
from controlnet.common.images import resized, to_hints, to_pil
from controlnet.config import ControlConfig
from controlnet.guidance import MODES, residual_levels
from controlnet.hints import detect, detectors, inpaint
from controlnet.hints.hint_image import HintImage
from controlnet.inference.image_to_image import Init
from controlnet.inference.upscale import enlarged

ASSETS = Path(__file__).parents[2] / "assets"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def sd():
    return small_sd()


@pytest.fixture(scope="module")
def net(sd):
    return small_control(sd)


def photo(size=(64, 96), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def hint_of(image, net, size=SIZE, **settings):
    return Control.from_image(net, image, **settings).hint.at(size)


# ------------------------------------------------------------------------------------------------------------ names


def test_the_public_names_are_offered_for_completion():
    assert {"Control", "ControlNet", "generate"} <= set(dir(controlnet)) and sorted(controlnet.__all__) == dir(
        controlnet
    )
    with pytest.raises(AttributeError, match="module 'controlnet' has no attribute 'Kontrol'"):
        _ = controlnet.Kontrol


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda sd, net: generate(sd, "a", [net]), "found a ControlNet in controls, expected a list of Control: "),
        (lambda sd, net: generate(sd, "a", net), "found a ControlNet in controls, expected a list of Control: "),
        (
            lambda sd, net: generate(sd, "a", Control.from_image(net, photo())),
            "found a Control in controls, expected a list of Control: ",
        ),
        (lambda sd, net: generate(sd, "a", [], "blurry"), "positional arguments"),
        (lambda sd, net: Control(net, photo()), "a hint is of type Image, expected a tensor: .* Control.from_image"),
        (
            lambda sd, net: Control.from_image(net, torch.zeros(1, 3, 64, 64)),
            "the image is of type Tensor, expected a path",
        ),
        (lambda sd, net: Control.from_image(net, photo(), detect="pose"), "pose reads files, found the type Image"),
    ],
)
def test_what_is_no_control_or_no_image_is_said(sd, net, call, message):
    with pytest.raises(TypeError, match=message):
        call(sd, net)


def test_pip_installs_what_requirements_txt_names():
    """But for pytest."""
    project = tomllib.loads((ASSETS.parent / "pyproject.toml").read_text())["project"]
    lines = (ASSETS.parent / "requirements.txt").read_text().splitlines()
    required = {line for line in lines if line and not line.startswith(("#", "pytest"))}
    assert set(project["dependencies"]) == required


# ------------------------------------------------------------------------------------------------------------ images


def test_an_image_of_any_mode_is_taken_as_one_sees_it(net, tmp_path):
    """White on the left, black on the right."""
    seen = Image.new("RGB", (96, 64))
    seen.paste("white", (0, 0, 48, 64))
    gray = np.asarray(seen)[..., 0]
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    see_through = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    see_through.paste((9, 9, 9, 0), (0, 0, 48, 64))
    turned = seen.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees to the right
    seen.save(tmp_path / "seen.png")
    modes = {mode: seen.convert(mode) for mode in ("L", "1", "P", "CMYK", "LA", "YCbCr")}
    files = {"path": tmp_path / "seen.png", "text": str(tmp_path / "seen.png")}
    arrays = {
        "gray": gray,
        "one channel": gray[..., None],
        "floats": np.asarray(seen).astype(np.float32) / 255,
        "doubles with alpha": np.asarray(see_through) / 255,
        "a view": np.asarray(seen)[::-1][::-1],
    }
    images = {**modes, "I;16": deep, "RGBA": see_through, "exif": turned, **files, **arrays}
    expected = to_hints([np.array(seen)])
    for name, image in images.items():
        assert torch.equal(hint_of(image, net), expected), name


def test_our_grayscale_example_is_a_hint(net):
    with Image.open(ASSETS / "scribble.png") as image:
        assert image.mode == "L"
        hint = hint_of(image, net)
    assert hint.shape == (1, 3, *SIZE) and torch.equal(hint, hint_of(ASSETS / "scribble.png", net))


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((64, 96, 2), np.uint8), r"the array is uint8 \(64, 96, 2\), expected uint8, or floats from 0 to 1"),
        (np.zeros((64,), np.uint8), r"the array is uint8 \(64,\)"),
        (np.zeros((0, 96), np.uint8), r"the array is uint8 \(0, 96\)"),
        (np.zeros((64, 96), np.int64), "the array is int64"),
        (np.full((64, 96), 255.0), "from 255 to 255, expected uint8, or floats from 0 to 1"),
        (np.full((64, 96), np.nan), "from nan to nan"),
        (Image.new("I", (96, 64)), "the image has 32 bits a channel"),
        ("none.png", '"none.png" does not exist'),
        ("none.json", '"none.json" does not exist'),
        (ASSETS / "pose.json", 'pose.json" is not an image: name the detector that reads it with detect: pose'),
    ],
)
def test_an_image_that_cannot_be_taken_is_said(net, image, message):
    with pytest.raises(ValueError, match=message):
        Control.from_image(net, image)


# ------------------------------------------------------------------------------------------------------------ detectors


def test_a_hint_is_detected_at_the_size_of_the_image_made(net):
    image = photo((8, 12)).resize((480, 320))
    hint = hint_of(image, net, detect="canny:low=50,high=150")
    expected = detect("canny", np.asarray(resized(image, SIZE)), low=50, high=150)
    assert expected.any() and torch.equal(hint, to_hints([expected]))
    assert hint_of(image, net, detect="canny", size=(32, 32)).shape == (1, 3, 32, 32)
    assert torch.equal(hint_of(image, net, detect="Canny:low=50,high=150"), hint)
    assert torch.equal(hint_of(image, net, detect="None"), hint_of(image, net))
    for wrong, message in {"edges": 'no detector "edges"', "canny:lowest=3": 'canny has no option "lowest=3"'}.items():
        with pytest.raises(ValueError, match=message):
            Control.from_image(net, image, detect=wrong)


def test_maps_and_poses_are_drawn(net):
    depth = np.linspace(0, 7, 64 * 96).reshape(SIZE)
    assert torch.equal(hint_of(depth, net, detect="depth"), to_hints([detect("depth", depth)]))
    assert hint_of(ASSETS / "pose.json", net, detect="pose").max() > 0


def test_inpainting_takes_a_mask(net):
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    control = Control.from_image(net, HintImage(photo(), "inpaint", mask=mask))
    expected = inpaint(np.asarray(photo()), np.asarray(mask))
    assert torch.equal(control.hint.at(SIZE), torch.from_numpy(expected).permute(2, 0, 1)[None])
    with pytest.raises(ValueError, match='"inpaint" needs a mask'):
        Control.from_image(net, photo(), detect="inpaint")
    with pytest.raises(ValueError, match="the mask is 64x96 .* expected the image's 96x64"):
        HintImage(photo(), "inpaint", mask=Image.new("L", (64, 96)))


def test_a_detector_works_once_for_a_size(sd, net, monkeypatch):
    calls = []
    canny = detectors.DETECTORS["canny"]
    monkeypatch.setitem(detectors.DETECTORS, "canny", replace(canny, make=lambda image: calls.append(1) or image))
    control = Control.from_image(net, photo(), detect="canny")
    assert calls == []
    for _ in range(2):
        generate(sd, "a", [control], steps=1, count=2)
    assert calls == [1]


def test_a_net_of_one_channel_gets_gray_and_one_of_six_a_tensor(sd):
    one, six = (ControlNet.from_unet(sd.unet, ControlConfig(hint_channels=channels)) for channels in (1, 6))
    gray = to_hints([np.array(photo().convert("L"))[..., None]])
    images = [generate(sd, "a", [c], steps=1) for c in (Control.from_image(one, photo()), Control(one, gray))]
    assert torch.equal(Control.from_image(one, photo()).hint.at(SIZE, channels=1), gray)
    assert np.array_equal(*map(np.asarray, (images[0][0], images[1][0])))
    with pytest.raises(ValueError, match=r"takes hints of 6 channels, but this one has 3: .* pass a tensor"):
        Control.from_image(six, photo())


# ------------------------------------------------------------------------------------------------------------ controls


def test_the_size_is_fitted_to_the_first_image(sd, net):
    wide, tall = (Control.from_image(net, photo(size)) for size in ((64, 200), (300, 100)))
    tensor = Control(net, torch.rand(1, 3, 32, 96))

    def made(controls, **options):
        return generate(sd, "a", controls, steps=1, **options)[0].size

    assert made([wide, tall]) == (192, 64) and made([tall, wide]) == (64, 192)
    assert made([wide, tensor]) == (96, 32)
    assert made([wide], size=(64, 96)) == (96, 64)
    assert made([wide], init=Init(photo((100, 100)))) == (64, 64)


def test_an_image_is_as_good_as_its_tensor(sd, net):
    image = photo((300, 450))
    made = generate(sd, "a", [Control.from_image(net, image, scale=0.7, end=0.5)], steps=2)
    tensor = to_hints([np.array(resized(image, SIZE))])
    expected = generate(sd, "a", [Control(net, tensor, scale=0.7, end=0.5)], steps=2)
    assert np.array_equal(np.asarray(made[0]), np.asarray(expected[0]))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "shuffle"])
def test_a_mode_gives_the_weights_and_the_branch(net, mode):
    weights, last_half = MODES[mode].weights(residual_levels(SMALL.unet)), [1.0] * 6 + [0.5]
    control = Control.from_image(net, photo(), mode=mode)
    assert (control.layers, control.prompt_only) == (weights, MODES[mode].prompt_only)
    control = Control.from_image(net, photo(), mode=mode, layers=last_half)
    assert control.layers == [a * b for a, b in zip(weights, last_half, strict=True)]


def test_a_shuffle_model_is_averaged_and_spares_the_negative_prompt(sd, net):
    with pytest.raises(ValueError, match='the mode is "shuffle": load its ControlNet with global_average_pooling=True'):
        Control.from_image(net, photo(), mode="shuffle")
    averaged = ControlNet.from_unet(sd.unet, ControlConfig(global_average_pooling=True))
    assert Control.from_image(averaged, photo(), mode="shuffle").prompt_only
    assert Control.from_image(averaged, photo()).prompt_only
    assert not Control.from_image(averaged, photo(), prompt_only=False).prompt_only


def test_settings_that_make_no_sense_are_said(net):
    with pytest.raises(ValueError, match='the mode of a control is "strong", expected one of balanced, '):
        Control.from_image(net, photo(), mode="strong")
    with pytest.raises(ValueError, match="a control has 2 layer weights, expected 7"):
        Control.from_image(net, photo(), layers=[1, 1])


# ------------------------------------------------------------------------------------------------------------ progress


def test_a_preview_is_decoded_only_when_it_is_asked_for(sd, monkeypatch):
    told, decoded, decode = [], [], sd.decode
    monkeypatch.setattr(sd, "decode", lambda latents: decoded.append(latents.shape) or decode(latents))
    generate(sd, "a", steps=2, size=SIZE, callback=told.append)
    assert [(p.image, p.step, p.steps) for p in told] == [(0, 1, 2), (0, 2, 2)]
    assert decoded == [(1, 4, 8, 12)]
    preview = told[0].preview()
    assert len(decoded) == 2 and np.array_equal(np.asarray(preview), np.asarray(to_pil(decode(told[0].x0)[0])))
    assert told[0].preview(side=48).size == (48, 32)


def test_a_preview_comes_with_cpu_offload_too(sd):
    previews = []
    generate(sd, "a", steps=1, cpu_offload="cpu", callback=lambda p: previews.append(p.preview()))
    assert [preview.size for preview in previews] == [(64, 64)]


def test_the_bar_shows_when_it_is_asked_for(sd, capsys):
    generate(sd, "a", steps=2, count=2)
    assert capsys.readouterr().err == ""
    generate(sd, "a", steps=2, count=2, progress=True)
    assert "4/4" in capsys.readouterr().err


def test_images_are_encoded_and_decoded_by_the_base(sd, monkeypatch):
    calls = []
    for name, part in {"posterior": sd.vae, "decode": sd}.items():
        plain = getattr(part, name)
        monkeypatch.setattr(part, name, lambda *arguments, n=name, f=plain: calls.append(n) or f(*arguments))
    generate(sd, "a", steps=2, init=Init(read_image(ASSETS / "cat.jpg")))
    assert calls == ["posterior", "decode"]


def test_a_tensor_out_of_range_is_no_hint(sd, net):
    hint = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"a hint is of torch.uint8, expected floats in \[0, 1\]: divide bytes by 255"):
        Control(net, (255 * hint).byte())
    for values in (255 * hint, 2 * hint - 1):
        with pytest.raises(ValueError, match=r"a hint is from -?\d.* to \d.*, expected 0 to 1 .or -1, for a hole"):
            generate(sd, "a", [Control(net, values)], steps=1)
    with pytest.raises(ValueError, match="a control's mask is from 0 to 255, expected 0 to 1"):
        generate(sd, "a", [Control(net, hint, mask=torch.tensor([0, 255]).expand(1, 1, 64, 2).byte())], steps=1)
    hint[..., 20:40] = -1
    generate(sd, "a", [Control(net, hint + 1e-6)], steps=1)  # rounding is none


def test_an_enlarged_hole_is_whole(net):
    hint = torch.full((1, 3, 64, 64), 0.5)
    hint[..., 32:] = -1
    large = enlarged(Control(net, hint), (128, 128)).hint
    assert (large[..., 64:] == -1).all() and (large[..., :60] == 0.5).all() and (large[..., :64] >= 0).all()


def test_an_image_to_begin_with_is_taken_as_a_hint_is(sd, tmp_path):
    """Of any mode, upright, from a file or an array; and so is its mask."""
    seen, mask = Image.fromarray(np.asarray(photo())[..., [0, 0, 0]]), Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    turned = [image.transpose(Image.Transpose.ROTATE_90) for image in (seen, mask)]
    for image in turned:
        image.getexif()[0x0112] = 6  # to be turned by 90 degrees to the right
    seen.save(tmp_path / "seen.png"), mask.save(tmp_path / "mask.png")
    painted = Image.new("RGBA", (96, 64))
    painted.paste("red", (0, 0, 48, 64))
    others = [turned, [tmp_path / "seen.png", str(tmp_path / "mask.png")], [np.asarray(seen), mask.convert("RGB")]]
    others += [[seen.convert("L"), mask.convert("1")], [seen.convert("RGBA"), painted]]
    for init in (Init(image, mask=mask) for image, mask in others):
        assert np.array_equal(init.image, seen) and np.array_equal(init.mask, mask)
        assert (init.image.mode, init.mask.mode) == ("RGB", "L")
    with pytest.raises(TypeError, match="the image is of type NoneType, expected a path, a PIL image or a NumPy array"):
        Init(None)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda sd, net: Control("canny", torch.zeros(1, 3, 64, 64)),
            "network is of type str, expected a ControlNet: C",
        ),
        (lambda sd, net: Control.from_image("canny", photo()), "a control's network is of type str, expected a Contr"),
        (lambda sd, net: Control.from_image(net, photo(), mask=photo()), "mask is of type Image, expected a tensor"),
        (lambda sd, net: generate(sd, "a", init=photo()), r"init is of type Image, expected an Init: .* Init\(image\)"),
        (lambda sd, net: generate(sd, "a", size=128), r"the size is 128, expected \(height, width\) in pixels"),
        (lambda sd, net: generate(sd, "a", size=(128.0, 64)), r"the size is \(128.0, 64\), expected \(height, width\)"),
        (lambda sd, net: generate(sd, "a", seed=0.5), "the seed is 0.5, expected a whole number"),
    ],
)
def test_what_is_of_another_type_is_said(sd, net, call, message):
    with pytest.raises(TypeError, match=message):
        call(sd, net)


def test_numbers_of_numpy_are_numbers(sd):
    (made,) = generate(sd, "a", steps=1, size=[*np.full(2, 64)], seed=np.int64(3))
    (want,) = generate(sd, "a", steps=1, size=(64, 64), seed=3)
    assert np.array_equal(made, want)


def test_a_control_of_another_precision_than_the_base_is_said(sd):
    control = Control.from_image(small_control(sd).to(torch.bfloat16), photo())
    with pytest.raises(ValueError, match="is torch.bfloat16 on cpu, expected the base's torch.float32 on cpu: load it"):
        generate(sd, "a", [control], steps=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(sd, "a", [control], steps=1)
