"""What goes into infer.py as an image: masks and hints of all kinds, how they come to a size, and what is said."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL, small_control, small_sd

from controlnet.common.image_files import read_image, read_mask
from controlnet.common.images import fitted, resized, to_hints
from controlnet.hints import detect, hint_image
from controlnet.hints.hint_image import HintImage
from controlnet.hints.pose import draw_pose
from controlnet.inference.inputs import hint_runs, read_inputs, read_start
from controlnet.inference.options import Options
from controlnet.inference.run import prepare

ROOT = Path(__file__).parents[3]
CAT = str(ROOT / "assets" / "cat.jpg")


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """A ControlNet whose name says nothing about its hints."""
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    small_control(small_sd()).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def noise(size=(64, 64), seed=0):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def left_half(size=(64, 64)):
    """White on the left."""
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    return image


def inputs(config=SMALL, **options):
    """-> size, init and hints."""
    options = Options(precision="fp32", **options)
    mask, init = read_start(options, config)
    size, hints = read_inputs(options, config, torch.device("cpu"), mask, init)
    return size, init, hints


# --------------------------------------------------------------------------------------------------------------- masks


def painted(colour, ground=(255, 255, 255), part=None):
    """Paint of one colour on the left, nothing on the right, where the file holds the colour `ground`."""
    image = Image.new("RGB", (64, 64), ground)
    image.paste(colour, (0, 0, 32, 64))
    image.putalpha(part or left_half())
    return image


def with_palette(image):
    indices = Image.fromarray((np.asarray(left_half()) > 0).astype(np.uint8), mode="P")
    indices.putpalette([0, 0, 0, 255, 255, 255])
    indices.info["transparency"] = 0
    return indices


LEFT = np.asarray(left_half())
DEEP, UNIT = LEFT.astype(np.uint16) * 257, (LEFT > 0).astype(np.uint8)
MASKS = {
    "gray.png": left_half(),
    "rgb.png": left_half().convert("RGB"),
    "opaque.png": left_half().convert("RGBA"),
    "one bit.png": left_half().convert("1"),
    "deep.png": Image.fromarray(DEEP),
    "white paint.png": painted("white"),
    "white paint on black.png": painted("white", (0, 0, 0)),
    "black paint.png": painted("black", (0, 0, 0)),
    "red paint.png": painted("red"),
    "nearly one colour.png": painted((250, 240, 245), (0, 9, 9)),
    "gray and alpha.png": painted("white").convert("LA"),
    "paint.webp": painted("white"),
    "palette.png": with_palette(left_half()),
    "black, white and nothing.png": Image.merge("RGBA", [left_half()] * 3 + [Image.new("L", (64, 64), 255)]),
    "0 and 1.png": Image.fromarray(UNIT),
    "0 and 1, rgb.png": Image.fromarray(UNIT).convert("RGB"),
    "0 and 1, deep.png": Image.fromarray(UNIT.astype(np.uint16)),
    "0 and 1, 32 bits.tif": Image.fromarray(UNIT.astype(np.int32)),
    "0 to 1, floats.tif": Image.fromarray(UNIT.astype(np.float32)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_white_where_it_is_painted_or_bright(name):
    MASKS[name].save(name, lossless=True)
    mask = read_mask(name)
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), LEFT)


def test_soft_paint_is_a_soft_mask():
    part = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1)))
    painted("white", part=part).save("soft.png")
    assert np.array_equal(np.asarray(read_mask("soft.png")), np.asarray(part))


def test_of_a_photograph_the_erased_part_is_the_mask():
    photograph = noise()
    photograph.putalpha(Image.fromarray(255 - LEFT))
    photograph.save("erased.png")
    assert np.array_equal(np.asarray(read_mask("erased.png")), LEFT)


def test_of_black_and_white_paint_the_white_is_the_mask():
    both = Image.new("LA", (64, 64), (0, 0))
    both.paste((255, 255), (0, 0, 32, 64))
    both.paste((0, 255), (32, 0, 48, 64))
    both.save("both.png")
    assert np.array_equal(np.asarray(read_mask("both.png")), LEFT)


@pytest.mark.parametrize("image", [Image.new("L", (8, 8)), Image.new("RGBA", (8, 8)), Image.new("F", (8, 8))])
def test_a_mask_of_nothing_is_refused(image):
    image.save("mask.tif")
    with pytest.raises(ValueError, match='the mask "mask.tif" is black everywhere: paint white'):
        read_mask("mask.tif")


def test_a_control_mask_painted_on_nothing_steers_where_it_is_painted(control):
    painted("white").save("mask.png")
    (hint,) = inputs(hint=[CAT], control=[control], control_mask=["mask.png"], size="64")[2]
    assert np.array_equal(hint.mask[0, 0].numpy(), UNIT)


# --------------------------------------------------------------------------------------------------- init and its mask


def erased(part, size=(64, 64)):
    image = noise(size)
    image.putalpha(part)
    return image


def test_an_erased_part_of_the_init_is_made_anew_and_that_is_said(capsys):
    erased(Image.fromarray(255 - LEFT)).save("init.png")
    _, init, _ = inputs(init="init.png")
    assert np.array_equal(np.asarray(init.mask), LEFT) and init.strength == 1
    assert np.array_equal(np.asarray(init.image)[:, 32:], np.asarray(noise())[:, 32:])
    assert 'a part of "init.png" is transparent: it is made anew' in capsys.readouterr().err
    Image.fromarray(255 - LEFT).save("mask.png")
    _, init, _ = inputs(init="init.png", mask="mask.png", strength=0.5)
    assert np.array_equal(np.asarray(init.mask), 255 - LEFT) and init.strength == 0.5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("corner", [0, 3])
def test_a_whole_init_and_one_with_round_corners_have_no_mask(corner, capsys):
    part = Image.new("L", (64, 64), 255)
    part.paste(0, (0, 0, corner, corner))
    erased(part).save("init.png")
    assert inputs(init="init.png")[1].mask is None and capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [(128, 128), (32, 32), (65, 64)])
def test_a_mask_of_another_size_is_resized_and_that_is_said(size, capsys, control):
    noise().save("init.png")
    left_half(size).save("mask.png")
    _, init, _ = inputs(init="init.png", mask="mask.png")
    assert init.mask.size == (64, 64) and np.abs(np.asarray(init.mask).astype(int) - LEFT).mean() < 4
    assert f'the mask "mask.png" is {size[0]}x{size[1]} (width x height): it is resized' in capsys.readouterr().err
    inpaint = dict(hint=["init.png"], detect=["inpaint"], control=[control], mask="mask.png")
    (hint,) = inputs(**inpaint)[2]
    assert hint.made[64, 64][..., :31].max() == -1 and hint.made[64, 64][..., 34:].min() >= 0
    assert "it is resized" in capsys.readouterr().err


def test_a_mask_of_another_shape_is_refused_with_advice():
    noise().save("init.png")
    left_half((96, 64)).save("mask.png")
    with pytest.raises(ValueError, match="the mask is 96x64 .* expected the image's 64x64 .*: crop or resize it"):
        inputs(init="init.png", mask="mask.png")


# ------------------------------------------------------------------------------------------- hints that are see-through


def strokes(colour, ground, width=3):
    from PIL import ImageDraw

    image = Image.new("RGB", (64, 64), ground)
    ImageDraw.Draw(image).line([(8, 8), (50, 20), (30, 56), (8, 8)], colour, width)
    return image


def without(image, ground):
    """Transparent where an image has this colour; the file then holds another there."""
    pixels = np.asarray(image)
    part = (pixels != np.array(ground)).any(axis=2).astype(np.uint8) * 255
    kept = np.where(part[..., None] > 0, pixels, 77)
    return Image.fromarray(np.dstack([kept, part]).astype(np.uint8))


BLACK, WHITE = (0, 0, 0), (255, 255, 255)
POSE = Image.fromarray(draw_pose(np.random.default_rng(0).uniform(10, 118, (18, 2)), (128, 128)))
FIGURE = Image.fromarray(np.pad(np.linspace(90, 230, 48 * 48).reshape(48, 48), 8).astype(np.uint8)).convert("RGB")
SEE_THROUGH = {
    "white strokes": (strokes(WHITE, BLACK), BLACK),
    "gray strokes": (strokes((160, 160, 160), BLACK), BLACK),
    "blue strokes": (strokes((0, 0, 120), BLACK), BLACK),
    "black strokes": (strokes(BLACK, WHITE), WHITE),
    "dark strokes": (strokes((60, 55, 60), WHITE), WHITE),
    "soft black strokes": (strokes(BLACK, WHITE, 9).resize((32, 32)).resize((64, 64)), WHITE),
    "a pose": (POSE, BLACK),
    "a soft pose": (POSE.resize((64, 64)), BLACK),
    "a figure in a depth map": (FIGURE, BLACK),
}


@pytest.mark.parametrize("name", SEE_THROUGH)
def test_behind_a_hint_is_what_its_strokes_stand_out_from(name):
    image, ground = SEE_THROUGH[name]
    without(image, ground).save("hint.png")
    for source in ("hint.png", without(image, ground), np.asarray(without(image, ground))):
        assert np.array_equal(np.asarray(HintImage.of(source).image), np.asarray(image))
    assert np.asarray(read_image("hint.png"))[0, 0].tolist() == [255, 255, 255]  # a photograph's ground is white


def test_a_hole_in_a_black_ground_is_black():
    image = strokes(WHITE, BLACK)
    image.putalpha(Image.fromarray(np.pad(np.full((64, 44), 255, np.uint8), ((0, 0), (0, 20)))))
    shown = np.asarray(HintImage.of(image).image)
    assert not shown[:, 52:].any() and shown.any()


# ------------------------------------------------------------------------------------------------------------------ fit


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (160, 64), (96, 33)])
def test_to_crop_is_to_cover_the_size_and_to_pad_is_to_lie_within_it(size):
    """In an image of its own coordinates, 100 high and 200 wide."""
    y, x = np.mgrid[0:100, 0:200]
    image = Image.fromarray(np.stack([y, x, np.full_like(x, 9)], axis=2).astype(np.uint8))
    height, width = size
    covering, within = max(height / 100, width / 200), min(height / 100, width / 200)
    for fit, scale in (("crop", covering), ("pad", within)):
        pixels = np.asarray(fitted(image, size, fit, (1, 2, 3))).astype(float)
        assert pixels.shape == (*size, 3)
        rows, columns = np.mgrid[0:height, 0:width]
        expected = [50 + (rows + 0.5 - height / 2) / scale - 0.5, 100 + (columns + 0.5 - width / 2) / scale - 0.5]
        down, across = np.abs(rows + 0.5 - height / 2), np.abs(columns + 0.5 - width / 2)
        inside = (down < 50 * scale - 1.5) & (across < 100 * scale - 1.5)
        for channel, coordinate in enumerate(expected):
            assert np.abs(pixels[..., channel] - coordinate)[inside].max() < 3 / scale, fit
        outside = (down > 50 * scale + 1.5) | (across > 100 * scale + 1.5)
        assert (pixels[outside] == (1, 2, 3)).all() and (fit == "pad" or not outside.any())
    assert np.array_equal(np.asarray(fitted(image, size)), np.asarray(resized(image, size)))


def test_hint_control_mask_and_mask_are_fitted_alike(control):
    noise((128, 64)).save("hint.png")
    left_half((128, 64)).save("mask.png")
    options = dict(hint=["hint.png"], control=[control], control_mask=["mask.png"], size="64")
    (padded,) = inputs(fit="pad", **options)[2]
    hint = padded.made[64, 64]
    assert not hint[:, :, :16].any() and not hint[:, :, 48:].any()
    assert torch.equal(hint[:, :, 16:48], to_hints([np.array(resized(noise((128, 64)), (32, 64)))]))
    assert padded.mask[0, 0, 16:48, :32].min() == 1 and padded.mask.sum() == 32 * 32
    (cropped,) = inputs(fit="crop", **options)[2]
    assert torch.equal(cropped.made[64, 64], to_hints([np.asarray(noise((128, 64)))[:, 32:96].copy()]))
    assert cropped.mask[..., :32].min() == 1 and cropped.mask[..., 32:].max() == 0
    inpaint = dict(hint=["hint.png"], detect=["inpaint"], control=[control], mask="mask.png", size="64")
    (padded,) = inputs(fit="pad", **inpaint)[2]
    hole = padded.made[64, 64][0, 0] == -1  # what is padded is made anew
    assert hole[:16].all() and hole[48:].all() and hole[16:48, :32].all() and not hole[16:48, 32:].any()


def test_the_padding_has_no_edges_to_detect(control):
    Image.new("RGB", (128, 64), "white").save("white.png")
    (hint,) = inputs(hint=["white.png"], detect=["canny"], control=[control], size="64", fit="pad")[2]
    assert not hint.made[64, 64].any()


def test_an_init_is_padded_in_its_mean_colour_which_is_made_anew():
    Image.new("RGB", (128, 64), (10, 20, 30)).save("init.png")
    left_half((128, 64)).save("mask.png")
    size, init, _ = inputs(init="init.png", mask="mask.png", size="64", fit="pad")
    made = init.resized(size)
    assert (np.asarray(made.image) == (10, 20, 30)).all()
    mask = np.asarray(made.mask)
    assert mask[:16].min() == 255 and mask[48:].min() == 255 and mask[16:48, 32:].max() == 0


def test_an_unknown_fit_is_refused():
    with pytest.raises(ValueError, match='fit is "squeeze", expected one of stretch, crop, pad'):
        HintImage(noise(), fit="squeeze")


# ------------------------------------------------------------------------------------------------------- several hints


@pytest.fixture
def folder(place):
    (place / "hints").mkdir()
    for name in ("b.png", "a.JPG", "c.avif"):
        noise().save(place / "hints" / name)
    (place / "hints" / "._a.png").write_bytes(b"of macOS")
    (place / "hints" / "notes.txt").write_text("no image")
    (place / "hints" / "pose.json").write_text("{}")
    (place / "hints" / "deeper").mkdir()
    return "hints"


def test_a_folder_or_pattern_is_a_run_for_each_of_its_images(folder):
    found = hint_runs(Options(hint=["hints"], prompt="a", detect=["canny"]))
    assert [run.hint for run in found] == [["hints/a.JPG"], ["hints/b.png"], ["hints/c.avif"]]
    assert all(replace(run, hint=["hints"]) == Options(hint=["hints"], prompt="a", detect=["canny"]) for run in found)
    assert [run.hint for run in hint_runs(Options(hint=["hints/*.png"]))] == [["hints/b.png"]]
    assert [run.hint for run in hint_runs(Options(hint=["hints"], detect=["pose"]))] == [["hints/pose.json"]]
    assert [run.hint for run in hint_runs(Options(hint=["h*/[ab].*"]))] == [["hints/a.JPG"], ["hints/b.png"]]


def test_the_other_hints_stay(folder):
    options = Options(hint=["x.png", "hints", "y.png"], detect=["none", "seg", "pose"])
    assert [run.hint for run in hint_runs(options)] == [
        ["x.png", f"hints/{name}", "y.png"] for name in ("a.JPG", "b.png", "c.avif")
    ]


def test_a_file_is_one_run_also_with_brackets_in_its_name():
    noise().save("photo[1].png")
    for hints in (["photo[1].png"], ["none.png"], ["circle.png", "pose.png"], []):
        assert hint_runs(Options(hint=hints)) == [Options(hint=hints)]


def test_a_folder_of_none_and_two_folders_are_refused(folder, place):
    (place / "empty").mkdir()
    (place / "empty" / "._a.png").write_bytes(b"of macOS")
    for hints, message in {
        ("empty",): 'there is no file for --detect none in "empty", expected .png, ',
        ("empty/*.png",): 'there is no file for --detect none in "empty/\\*.png"',
        ("hints", "hints/*.png"): '"hints" and "hints/\\*.png" are several hints each, expected one --hint at most',
    }.items():
        with pytest.raises(ValueError, match=message):
            hint_runs(Options(hint=list(hints)))


# -------------------------------------------------------------------------------------------------------- what is said


def test_a_hint_that_is_not_what_its_control_reads_is_said(control, capsys, place):
    (place / "tiny-canny.safetensors").write_bytes(Path(control).read_bytes())
    Image.fromarray(255 - detect("canny", np.asarray(read_image(CAT)))).save("inverted.png")
    for name, detector, message in (
        (CAT, "none", f'"{CAT}" looks like a photograph, and tiny-canny.safetensors reads light lines on black: add'),
        (CAT, "canny", ""),
        (CAT, "canny:low=1000,high=2000", "--detect canny:low=1000,high=2000 finds nothing in"),
        (
            "inverted.png",
            "none",
            "looks like dark lines on white, and tiny-canny.safetensors reads light lines on black",
        ),
        ("inverted.png", "invert", ""),
        ("canny.png", "none", ""),
        ("canny.png", "canny", '"canny.png" looks like a hint already: leave out --detect canny'),
        ("pose.json", "pose", '--detect pose makes of "pose.json" limbs in their colours on black'),
        ("depth.png", "none", "looks like a gray image"),
    ):
        inputs(hint=[name], detect=[detector], control=["tiny-canny.safetensors"], size="128")
        said = [
            line for line in capsys.readouterr().err.splitlines() if "taking" not in line and "stretched" not in line
        ]
        assert message in said[0] and len(said) == 1 if message else said == [], said


@pytest.mark.parametrize(
    "name, advice",
    [
        ("inverted.png", "looks like dark lines on white, .*, or make a hint of it with --detect invert$"),
        (CAT, "looks like a photograph, .*, or make a hint of it with --detect canny$"),
        ("black.png", "looks like one colour, .* say --control with one of .*depth$"),
        ("flat.png", "looks like one colour, "),
    ],
)
def test_a_hint_that_does_not_tell_its_control_says_what_it_looks_like(name, advice):
    Image.fromarray(255 - detect("canny", np.asarray(read_image(CAT)))).save("inverted.png")
    Image.new("L", (64, 64)).save("black.png")
    Image.new("L", (300, 2), 90).save("flat.png")
    with pytest.raises(ValueError, match=advice):
        inputs(replace(SMALL, name="tiny"), hint=[name], size="64")


def test_a_detector_runs_once_for_each_size_of_images(control, monkeypatch):
    seen = []
    monkeypatch.setattr(hint_image, "detect", lambda name, image, **_: seen.append(image.shape[:2]) or image)
    noise((128, 128)).save("init.png")
    left_half((128, 128)).save("mask.png")
    given = dict(hint=["init.png"], detect=["canny"], control=[control], size="64", init="init.png")
    _, _, (hint,) = inputs(**given, mask="mask.png", only_masked=8)
    assert seen == [(64, 64)] and hint.made[64, 64].shape == (1, 3, 64, 64)
    seen.clear()
    _, _, (hint,) = inputs(**given, upscale=2.0)
    assert seen == [(64, 64), (128, 128)] and list(hint.made) == seen


def test_photographs_are_laid_on_white_as_in_training_and_strokes_on_black():
    drawing = Image.new("RGBA", (64, 64))
    drawing.paste((200, 200, 200, 255), (16, 16, 48, 48))
    for detector, ground in {"gray": 1, "tile": 1, "invert": 1, "none": 0}.items():
        assert HintImage.of(drawing, detector).at((64, 64))[0, 0, 0, 0] == ground, detector
    hole = HintImage.of(drawing, "inpaint", mask=left_half())
    assert hole.at((64, 64))[0, 0, 0, -1] == 1
    with pytest.raises(ValueError, match="takes hints of 1 channels, and the detector inpaint makes 3"):
        hole.at((64, 64), channels=1)  # in gray a hole would be black


@pytest.mark.parametrize("option", ["hint", "init", "control_mask"])
def test_an_address_and_a_pipe_are_refused_as_they_were_typed(option, control):
    read_end, write_end = os.pipe()
    for name, message in {
        "https://host/a.png": '"https://host/a.png" is an address, expected a file: download the image first',
        f"/dev/fd/{read_end}": f'"/dev/fd/{read_end}" is a pipe or a device: give the path of an image',
    }.items():
        given = {"hint": [CAT], "control": [control]} if option == "control_mask" else {}
        with pytest.raises(ValueError, match=message):
            inputs(**given, **{option: name if option == "init" else [name]})
    os.close(read_end), os.close(write_end)


@pytest.mark.parametrize("name", ["depth", "pose", "seg"])
def test_a_photograph_for_a_detector_of_maps_is_a_sentence(name):
    with pytest.raises(ValueError, match="detector openpose finds" if name == "pose" else "detector midas finds depth"):
        inputs(hint=[CAT], detect=[name])


@pytest.mark.parametrize("hint", ["hints", "hints/*.png", "./h*/*"])
def test_images_are_not_put_where_the_next_run_takes_them_for_hints(folder, hint):
    for out in ("hints", "hints/../hints/"):
        with pytest.raises(ValueError, match="take its images for hints: give another folder"):
            hint_runs(Options(hint=[hint], out=Path(out)))
    assert hint_runs(Options(hint=[hint], out=Path("hints/made")))
    assert hint_runs(Options(hint=[hint], out=Path("out")))
    assert hint_runs(Options(hint=["hints"], detect=["pose"], out=Path("hints")))  # these are JSON


def test_a_pattern_says_nothing_of_other_folders(place):
    noise().save("a.png")
    assert hint_runs(Options(hint=["*.png"], out=Path("out")))


@pytest.mark.parametrize("option", ["init", "mask", "control_mask"])
def test_an_empty_name_of_a_file_is_none(option, control):
    given = {"hint": [CAT], "control": [control], "control_mask": [""]} if option == "control_mask" else {option: ""}
    with pytest.raises(ValueError, match="the path of an image is empty: give that of a file"):
        inputs(**given)


def test_a_strength_that_leaves_no_step_is_said(capsys):
    """Before anything is made: of 4 steps 0.2 is none, and 0 asks for none."""
    noise().save("init.png")
    given = dict(init="init.png", size="64", steps=4, control_mask=[], device="cpu")
    for options, said in {(0.2, 1.0, 0.5): "--strength 0.2", (0.5, 2.0, 0.2): "--upscale-strength 0.2"}.items():
        strength, upscale, again = options
        (job,) = prepare(Options(**given, strength=strength, upscale=upscale, upscale_strength=again), {})
        assert f"{said} leaves none of the 4 steps: the image is only resized" in capsys.readouterr().err
        assert job.steps == (2 if upscale == 2 else 0)
    prepare(Options(**given, strength=0.0), {})
    assert "leaves none" not in capsys.readouterr().err


def test_of_a_folder_the_hint_at_fault_is_named(control):
    """Where the error is about the image and not about its file."""
    noise((400, 4)).save("long.png")
    left_half().save("mask.png")
    np.save("five.npy", np.zeros((64, 64, 5), np.uint8))
    for name, detector, message in (
        ("long.png", "none", r'"long.png": an image is 400x4 .*, expected at most 16 times as long'),
        ("long.png", "inpaint", r'"long.png": the mask is 64x64 .*, expected the image\'s 400x4'),
        ("five.npy", "none", r'"five.npy": the ControlNet takes hints of 3 channels, but this one has 5'),
    ):
        mask = "mask.png" if detector == "inpaint" else None
        with pytest.raises(ValueError, match=message):
            inputs(hint=[name], detect=[detector], control=[control], mask=mask)
