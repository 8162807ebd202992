"""A hint from its file is the same for training and infer.py, in any number of channels."""

import numpy as np
import pytest
from PIL import Image

from controlnet.hints.hint_file import is_label_map, read_hint
from controlnet.hints.hint_image import HintImage
from controlnet.training import pair_files

SIZE = (6, 10)  # height, width
RAMP = np.linspace(0, 255, 60).astype(np.uint8).reshape(SIZE)
COLOUR = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), dtype=np.uint8)
STROKES = np.dstack([np.full((*SIZE, 3), 255, np.uint8), np.where(RAMP > 230, 255, 0).astype(np.uint8)])


def turned(path):
    """As a camera stores it that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(COLOUR[..., :3])).save(path, exif=exif)


def palette(path):
    Image.fromarray(RAMP // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE).save(path)


STORED = {  # how a file is made -> what is to be read of it, RGB and opacity
    "gray": (lambda path: Image.fromarray(RAMP).save(path), np.dstack([RAMP] * 3), 255),
    "16 bits": (lambda path: Image.fromarray(RAMP.astype(np.uint16) * 257).save(path), np.dstack([RAMP] * 3), 255),
    "turned": (turned, COLOUR[..., :3], 255),
    "palette": (palette, np.dstack([RAMP // 64 * 64] * 3), 255),
    "white strokes": (
        lambda path: Image.fromarray(STROKES).save(path),
        np.dstack([STROKES[..., 3]] * 3),
        STROKES[..., 3],
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_each_number_of_channels_is_the_same_image(tmp_path, name):
    write, rgb, opacity = STORED[name]
    path = tmp_path / "hint.png"
    write(path)
    gray = np.array(Image.fromarray(rgb).convert("L"))[..., None]
    assert np.array_equal(read_hint(path, 3), rgb) and np.array_equal(read_hint(path, 1), gray)
    four = read_hint(path, 4)
    assert four.shape == (*SIZE, 4) and (four[..., 3] == opacity).all()
    assert np.array_equal(four[four[..., 3] > 0][:, :3], rgb[four[..., 3] > 0])
    for channels in (1, 3, 4):
        read = pair_files.read_hint(path, channels)
        hint = HintImage.of(path).at(SIZE, channels)
        assert np.array_equal((255 * hint[0]).round().byte().permute(1, 2, 0).numpy(), read)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_arrays_have_any_number_of_channels(tmp_path, channels):
    array = np.random.default_rng(1).integers(0, 256, (*SIZE, channels), dtype=np.uint8)
    for values in (array, array / 255):
        np.save(tmp_path / "hint.npy", values)
        assert np.array_equal(read_hint(tmp_path / "hint.npy", channels), array)
        hint = HintImage.of(tmp_path / "hint.npy").at(SIZE, channels)
        assert np.array_equal((255 * hint[0]).round().byte().permute(1, 2, 0).numpy(), array)


def test_opacity_is_a_channel_that_weighs_no_other_when_it_is_resized(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "hint.png")
    hint = HintImage.of(tmp_path / "hint.png").at((3, 5), 4)
    mean = COLOUR.reshape(3, 2, 5, 2, 4).mean(axis=(1, 3))
    assert np.abs(255 * hint[0].permute(1, 2, 0).numpy() - mean).max() <= 1.01  # Pillow rounds after each axis


@pytest.mark.parametrize("channels", [2, 5])
def test_other_channels_are_one_sentence(tmp_path, channels):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\.npy array \(H, W, C\)"):
        read_hint(tmp_path / "a.png", channels)
    with pytest.raises(ValueError, match=rf"of {channels} channels, but this one has 4"):
        HintImage.of(tmp_path / "a.png").at(SIZE, channels)
    with pytest.raises(ValueError, match="the detector canny makes 3"):
        HintImage.of(tmp_path / "a.png", "canny").at(SIZE, channels)


def blocks(*values):
    return np.repeat(np.repeat(np.array(values, np.uint8).reshape(2, -1), 8, 0), 8, 1)[..., None]


@pytest.mark.parametrize(
    "hint, expected",
    [
        (blocks(0, 1, 2, 3), True),
        (blocks(0, 1, 1, 255), True),
        (blocks(0, 0, 0, 1), True),
        (blocks(0, 11, 40, 2).repeat(3, axis=2), True),
        (blocks(0, 255, 255, 0), False),  # edges
        (blocks(0, 64, 128, 192), False),
        (blocks(0, 0, 0, 0), False),  # black, which is something else
        (RAMP[..., None] // 8, False),  # a dark depth map has no patches
        (COLOUR[..., :3], False),
        (COLOUR, False),
    ],
)
def test_label_maps_are_known_by_their_few_small_numbers(hint, expected):
    assert is_label_map(hint) == expected
