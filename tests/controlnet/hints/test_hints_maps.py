"""Hints from depth, normal and label maps: what is near is white, what is not known is black, and files as they are."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from controlnet.hints import detect, detect_file
from controlnet.hints.ade20k import ADE20K
from controlnet.hints.maps import read_map

RAMP = np.linspace(1, 5, 256).reshape(16, 16)  # 255 equal steps


# ---------------------------------------------------------------------------------------------------- depth


def test_the_nearest_is_white_and_the_farthest_black():
    shown = np.arange(256).reshape(16, 16)
    assert np.array_equal(detect("depth", RAMP)[..., 1], shown)
    assert np.array_equal(detect("depth", -3 * RAMP)[..., 1], 255 - shown)
    assert np.array_equal(detect("depth", (RAMP * 1000).round().astype(np.uint16))[..., 1], shown)


def test_distances_are_inverted_first():
    """As MiDaS's inverse depth: halfway in 1 / distance is middle gray, not halfway in distance."""
    hint = detect("depth", np.array([[1.0, 1.6, 4.0]]), distance=True)
    assert hint[0, :, 0].tolist() == [255, round(255 * (1 / 1.6 - 0.25) / 0.75), 0]
    inverse = detect("depth", 1 / RAMP)
    assert np.abs(detect("depth", RAMP, distance=True).astype(int) - inverse).max() == 0


def test_unknown_depth_is_black_and_counts_for_nothing():
    values = np.array([[np.nan, 2.0, 3.0, 4.0, np.inf]])
    assert detect("depth", values)[0, :, 2].tolist() == [0, 0, 128, 255, 0]
    metres = np.array([[0.0, 1.0, 2.0, -1.0]])
    assert detect("depth", metres, distance=True)[0, :, 0].tolist() == [0, 255, 0, 0]
    assert not detect("depth", np.ones((3, 3))).any()  # nothing is nearer than anything
    with pytest.raises(ValueError, match="no finite value"):
        detect("depth", np.full((2, 2), np.nan))


@pytest.mark.parametrize("shape", [(1, 16, 16), (16, 16, 1)])
def test_a_channel_of_one_is_no_channel(shape):
    assert np.array_equal(detect("depth", RAMP.reshape(shape)), detect("depth", RAMP))


def test_a_colour_photograph_is_no_depth():
    with pytest.raises(ValueError, match="not colours: a map in colours needs no detector"):
        detect("depth", np.arange(48).reshape(4, 4, 3))
    with pytest.raises(ValueError, match="in a photograph the detector midas finds depth"):
        detect("depth", np.arange(48).reshape(4, 4, 3))


# ---------------------------------------------------------------------------------------------------- normals


def test_normals_are_scaled_to_length_one_and_shown_as_colours():
    vectors = np.array([[(0, 0, 2.0), (-3.0, 0, 0), (0, 4.0, 3.0), (0, 0, 0), (np.nan, 0, 1)]])
    colours = detect("normal", vectors)[0].tolist()
    assert colours == [[128, 128, 255], [0, 128, 128], [128, 230, 204], [0, 0, 0], [0, 0, 0]]


def test_axes_can_be_mirrored():
    vectors = np.random.default_rng(0).normal(size=(5, 6, 3))
    assert np.array_equal(detect("normal", vectors, flip_x=True), detect("normal", vectors * (-1, 1, 1)))
    assert np.array_equal(detect("normal", vectors, flip_y=True), detect("normal", vectors * (1, -1, 1)))


def test_an_image_of_normals_stays_as_it_is():
    vectors = np.random.default_rng(0).normal(size=(20, 20, 3))
    picture = detect("normal", vectors)
    assert np.abs(detect("normal", picture).astype(int) - picture).max() <= 2  # they were rounded
    assert np.abs(detect("normal", picture * np.uint16(257)).astype(int) - picture).max() <= 2
    with pytest.raises(ValueError, match="shape \\(20, 20\\)"):
        detect("normal", picture[..., 0])


# ---------------------------------------------------------------------------------------------------- labels


def test_classes_have_the_colours_of_ade20k():
    """Some of them as the dataset's users know them: wall, sky, tree, person, car, and the last one, flag."""
    colours = detect("segmentation", np.array([[0, 2, 4, 12, 20, 149]]))[0].tolist()
    assert colours == [[120, 120, 120], [6, 230, 230], [4, 200, 3], [150, 5, 61], [0, 102, 200], [92, 0, 255]]
    assert len(ADE20K) == 150 and len({tuple(colour) for colour in ADE20K}) == 149  # road's is skyscraper's, too
    assert tuple(ADE20K[6]) == tuple(ADE20K[48]) and int(ADE20K.astype(int).sum()) == 58427


def test_no_class_is_black_and_the_first_may_be_one():
    labels = np.array([[0, 1, 3, 255]], dtype=np.uint8)
    assert detect("segmentation", labels)[0, 3].tolist() == [0, 0, 0]
    moved = detect("segmentation", labels, first=1)[0].tolist()
    assert moved == [[0, 0, 0], [120, 120, 120], [6, 230, 230], [0, 0, 0]]


@pytest.mark.parametrize("wrong", [150, -2, 2.5, np.nan])
def test_what_is_no_class_is_refused(wrong):
    with pytest.raises(ValueError, match=f"the value {wrong}, expected the classes of ADE20K, 0 to 149"):
        detect("segmentation", np.array([[0, wrong]]))


# ---------------------------------------------------------------------------------------------------- files


def test_arrays_are_read_from_npy_and_npz(tmp_path):
    np.save(tmp_path / "a.npy", RAMP)
    np.savez(tmp_path / "a.npz", RAMP)
    np.savez(tmp_path / "two.npz", left=RAMP, right=RAMP)
    for name in ("a.npy", "a.npz"):
        assert np.array_equal(detect_file("depth", tmp_path / name), detect("depth", RAMP))
    with pytest.raises(ValueError, match="2 arrays \\(left, right\\), expected one"):
        read_map(tmp_path / "two.npz")


def test_sixteen_bits_of_an_image_are_kept(tmp_path):
    values = (np.arange(256).reshape(16, 16) + 30000).astype(np.uint16)
    for name in ("depth.png", "depth.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_map(tmp_path / name), values)
        assert np.array_equal(detect_file("depth", tmp_path / name)[..., 0], np.arange(256).reshape(16, 16))


def test_a_palettes_indices_are_the_labels(tmp_path):
    labels = np.array([[0, 2], [12, 255]], dtype=np.uint8)
    image = Image.fromarray(labels, mode="P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "labels.png")
    assert np.array_equal(detect_file("segmentation", tmp_path / "labels.png"), detect("segmentation", labels))


def test_a_gray_image_may_have_three_channels_or_four(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for mode in ("L", "LA", "RGB", "RGBA"):
        Image.fromarray(gray).convert(mode).save(tmp_path / "gray.png")
        assert np.array_equal(detect_file("depth", tmp_path / "gray.png")[..., 0], gray)


def test_what_is_no_map_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.tif")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.write(tmp_path / "text.npy", "text.txt")
    for name, what in {
        "text.png": "is not readable as an image",
        "text.npy": "is not readable as an array",
        "objects.npy": "is not readable as an array",
        "cmyk.tif": "are CMYK, expected gray",
        "missing.png": "does not exist",
        "missing.npy": "is not readable as an array",
        "text.npz": "holds .S8, expected numbers",
    }.items():
        with pytest.raises(ValueError, match=f'{name}" {what}'):
            read_map(tmp_path / name)
    with pytest.raises(ValueError, match="expected numbers"):
        read_map(tmp_path / "words.npy")
