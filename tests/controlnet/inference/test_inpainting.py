"""Inpainting bases: what is seen, made and refused. tests/test_interop.py compares latents with diffusers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALLEST, for_inpainting, small_control, small_sd
from test_generate import arrays, differ, hint
from test_image_to_image import left_half, photo

import infer
import train
from controlnet.common.images import save_png, to_images
from controlnet.guidance import Control
from controlnet.inference.generate import generate
from controlnet.inference.image_to_image import Init, known_part
from controlnet.inference.memory import parameters
from controlnet.model import ControlNet
from tools import describe


@pytest.fixture(scope="module")
def sd():
    return for_inpainting(small_sd(SMALLEST))


@pytest.fixture(scope="module")
def control(sd):
    return Control(small_control(small_sd(SMALLEST)), hint())


def changed(image, box):
    image = image.copy()
    image.paste((255, 0, 0), box)
    return image


def test_the_mask_is_that_of_a_positions_first_pixel_and_hides_the_image(sd):
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 1:24], mask[8, 0] = 128, 127  # the first column of positions begins with black
    part = known_part(sd, Init(photo(), 1.0, Image.fromarray(mask)), [torch.Generator().manual_seed(0)], False)
    wanted = torch.zeros(8, 8)
    wanted[:, 1:3] = 1
    assert torch.equal(part[0, 0], wanted)
    gray = to_images([np.array(photo())])
    gray[:, :, mask >= 128] = 0
    torch.testing.assert_close(part[:, 1:], sd.encode(gray, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_is_masked_is_made_from_what_is_not(sd, control, strength):
    """Of what is masked nothing is seen, but where the strength is below 1."""
    image = photo()
    make = lambda image: arrays(sd, controls=[control], init=Init(image, strength, left_half()))[0]  # noqa: E731
    made = make(image)
    assert np.array_equal(made[:, 32:], np.asarray(image)[:, 32:]) and differ(made, np.asarray(image))
    masked_changed, known_changed = make(changed(image, (8, 8, 24, 24))), make(changed(image, (40, 8, 56, 24)))
    assert np.array_equal(made, masked_changed) == (strength == 1)
    assert differ(made[:, :32], known_changed[:, :32])


def test_each_image_is_its_own(sd, control):
    """In whatever batch, and with whatever is in memory. Each draws from its own generator."""
    options = dict(controls=[control], init=Init(photo(), 1.0, left_half()), seed=3)
    images = arrays(sd, count=2, batch_size=1, **options)
    assert differ(*images)
    for other in ({"batch_size": 2}, {"cpu_offload": "cpu"}):
        assert np.abs(arrays(sd, count=2, **options, **other).astype(int) - images).max() <= 2
    part = Init(photo((128, 192)), 1.0, left_half((128, 192)), only_masked=8)
    (image,) = generate(sd, "a circle", init=part, steps=1, size=(64, 64))
    assert image.size == (192, 128)


@pytest.mark.parametrize("init", [None, Init(photo())])
def test_without_a_mask_it_is_said_what_is_missing(sd, init):
    with pytest.raises(ValueError, match='the base "small" is an inpainting model.*give --init and --mask, or another'):
        generate(sd, "a circle", init=init)


def test_a_control_is_a_copy_of_another_bases_encoder(sd):
    with pytest.raises(ValueError, match="copy the encoder of the base that it was made from"):
        ControlNet.from_unet(sd.unet)
    wide = replace(SMALLEST, unet=replace(SMALLEST.unet, inpainting=True))
    (wide_unet, *wide_others), (unet, *others) = parameters(wide), parameters(SMALLEST)
    assert (wide_unet - unet, wide_others) == (5 * 8 * 9, others)


@pytest.mark.filterwarnings("ignore")  # of weights that overflow
def test_the_programs(sd, control, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sd.save("base.safetensors")
    control.net.save("control.safetensors")
    save_png(photo(), "photo.png", {})
    save_png(left_half(), "left.png", {})
    use = ["--base", "base.safetensors", "--device", "cpu"]
    assert infer.main([*use, "--prompt", "a circle", "--init", "photo.png"]) == 2
    assert "is an inpainting model" in capsys.readouterr().err
    hint = ["--hint", "photo.png", "--control", "control.safetensors"]
    made = ["--init", "photo.png", "--mask", "left.png", "--steps", "1", "--out", "made.png"]
    assert infer.main([*use, *hint, *made]) == 0
    assert np.array_equal(np.asarray(Image.open("made.png"))[:, 32:], np.asarray(photo())[:, 32:])
    assert describe.main(["base.safetensors"]) == 0
    assert "to fill what is masked: pass it as --base, with --init and --mask" in capsys.readouterr().out
    assert train.main([*use, "--out", "run", "--dry-run"]) == 2
    assert "on which ControlNets are not trained: train on the base that it was made" in capsys.readouterr().err
