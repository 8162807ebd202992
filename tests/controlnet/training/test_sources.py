"""Samples from folders and synthetic datasets: the split, one transform for image and hint."""

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from controlnet.common.images import to_uint8
from controlnet.hints import detect, detect_file
from controlnet.hints.hint_image import HintImage
from controlnet.objective import seeded
from controlnet.training.opening import open_sources, split
from controlnet.training.options import TrainSettings
from controlnet.training.pair_files import read_hint, size_of
from controlnet.training.pairs import BadSample, Entry, Wanted, recognise
from controlnet.training.previews import own_samples
from controlnet.training.sources import FolderSource
from controlnet.training.transform import Transform
from controlnet.worlds import WORLDS

# ------------------------------------------------------------------------------------------------------ transform


def marked(height=60, width=100, channels=3):
    """Every pixel says where it is: row, column and a constant."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([2 * rows, 2 * columns, 0 * rows + 7, rows + columns][:channels], axis=2).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_and_hint_stay_on_each_other(channels):
    """With a hint that is the image, whatever happens to one must happen to the other, pixel by pixel."""
    transform = Transform((40, 40), random_crop=True, flip=True)
    seen, hint = set(), marked(channels=channels)
    for seed in range(12):
        place = transform.of((60, 100), seeded(seed))
        image, moved = place(marked()), place(hint)
        assert image.shape == (40, 40, 3) and moved.shape == (40, 40, channels)
        assert np.array_equal(image[..., : min(channels, 3)], moved[..., :3])
        seen.add((int(image[0, 0, 1]), bool(image[0, 0, 1] > image[0, -1, 1])))
    assert {mirrored for _, mirrored in seen} == {True, False} and len(seen) > 4


def test_a_crop_without_randomness_is_the_middle():
    image = Transform((60, 40), random_crop=True, flip=True).of((60, 100))(marked())
    assert np.array_equal(image, marked()[:, 30:70])


def test_an_image_covers_the_size_and_keeps_its_shape():
    image = Transform((120, 120)).of((60, 100))(marked())
    slope = (image[60, 100, 1].astype(int) - image[60, 20, 1]) / 80
    assert image.shape == (120, 120, 3) and slope == pytest.approx(2 / 2, rel=0.05)  # twice as large on both axes


def test_a_smaller_hint_is_brought_to_the_images_size():
    hint = Transform((60, 100)).of((60, 100))(np.array(Image.fromarray(marked()).resize((50, 30))))
    assert hint.shape == (60, 100, 3) and np.abs(hint.astype(int) - marked())[4:-4, 4:-4].max() <= 3


# -------------------------------------------------------------------------------------------------------- folders


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)


def fill50k_layout(folder, count):
    lines = [{"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"number {i}"} for i in range(count)]
    (folder / "prompt.json").write_text("\n".join(json.dumps(line) for line in lines))
    return [(folder / f"target/{i}.png", folder / f"source/{i}.png") for i in range(count)]


def test_a_folder_gives_the_samples_that_lie_in_it(tmp_path):
    for i, (image, hint) in enumerate(fill50k_layout(tmp_path, 4)):
        save(image, np.full((64, 64, 3), 10 * i, np.uint8))
        save(hint, np.full((64, 64, 3), 10 * i + 5, np.uint8))
    source = FolderSource("pairs", recognise(tmp_path, Wanted()).entries, Transform((64, 64)))
    assert len(source) == 4
    for i in range(4):
        sample = source.sample(i)
        assert (sample.image == 10 * i).all() and (sample.hint == 10 * i + 5).all()
        assert sample.caption == f"number {i}" and np.array_equal(source.hint(i), sample.hint)
        assert source.name_of(i) == str(tmp_path / f"target/{i}.png")


def test_a_hint_lies_on_its_image_whether_it_is_read_with_it_or_alone(tmp_path):
    """Also one that is narrower by a hundredth, and under an image that the camera turned."""
    save(tmp_path / "hint.png", marked(80, 79))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(marked(80, 120)).save(tmp_path / "turned.jpg", exif=exif)
    save(tmp_path / "image.png", marked(80, 80))
    save(tmp_path / "upright.png", marked(120, 80))
    for image, hint in (("image.png", "hint.png"), ("turned.jpg", "upright.png")):
        entries = [Entry(tmp_path / image, tmp_path / hint, "c")]
        source = FolderSource("x", entries, Transform((64, 64)))
        assert np.array_equal(source.hint(0), source.sample(0).hint)


def test_the_size_of_an_image_takes_its_header_alone(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("its pixels are decoded"))
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff"):
        for how, size in (({}, (60, 100)), ({"exif": exif}, (100, 60))):
            Image.fromarray(marked()).save(tmp_path / name, **how)
            assert size_of(tmp_path / name) == size
    png = tmp_path / "behind.png"  # other programs tell behind the pixels how a picture is turned
    Image.fromarray(marked()).save(png)
    with open(png, "r+b") as file:
        file.seek(-12, os.SEEK_END)
        PngImagePlugin.putchunk(file, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        PngImagePlugin.putchunk(file, b"IEND")
    assert size_of(png) == (100, 60)
    source = FolderSource("x", [Entry(tmp_path / "a.png", tmp_path / "hint.npy", "c")], Transform((60, 100)))
    np.save(tmp_path / "hint.npy", marked(100, 60))
    assert source.size(0) == (60, 100) and source.hint(0).shape == (60, 100, 3)


def test_bad_pairs_say_what_is_wrong_with_them(tmp_path):
    save(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    save(tmp_path / "wide.png", np.zeros((64, 96, 3), np.uint8))
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for image, hint, words in (
        ("a.png", "wide.png", "same shape"),
        ("broken.png", "a.png", "not readable"),
        ("a.png", "none.png", "does not exist"),
    ):
        source = FolderSource("x", [Entry(tmp_path / image, tmp_path / hint, "c")], Transform((64, 64)))
        with pytest.raises(BadSample, match=words):
            source.sample(0)
    source.entries = [Entry(tmp_path / "a.png", tmp_path / "wide.png", "c")]
    with pytest.raises(BadSample, match="same shape"):  # also where the latents are there, and the hint is another now
        source.hint(0)


def test_hints_have_the_channels_that_are_asked_for(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    save(tmp_path / "rgba.png", colour)
    save(tmp_path / "gray.png", colour[..., :1])
    np.save(tmp_path / "six.npy", np.linspace(0, 1, 180).reshape(6, 5, 6))
    assert np.array_equal(read_hint(tmp_path / "rgba.png", 4), colour)
    assert np.array_equal(read_hint(tmp_path / "gray.png", 1), colour[..., :1])
    assert read_hint(tmp_path / "gray.png", 3).shape == (6, 5, 3)
    six = read_hint(tmp_path / "six.npy", 6)
    assert six.shape == (6, 5, 6) and six.flat[0] == 0 and six.flat[-1] == 255
    with pytest.raises(BadSample, match="6 channels, and the ControlNet reads 3"):
        read_hint(tmp_path / "six.npy", 3)
    np.save(tmp_path / "large.npy", np.full((6, 5), 2.0))
    with pytest.raises(BadSample, match="outside"):
        read_hint(tmp_path / "large.npy", 1)


# --------------------------------------------------------------------------------------------------------- sources


def test_validation_pairs_are_not_trained_on_and_always_the_same():
    entries = [Entry(f"{i}.png", None, "x") for i in range(100)]
    train, validation = split(entries, None)
    assert len(validation) == 5 and set(train) | set(validation) == set(entries) and not set(train) & set(validation)
    assert split(entries, None) == (train, validation)
    assert len(split(entries * 20, None)[1]) == 32 and split(entries, 0)[1] == []
    with pytest.raises(ValueError, match="for validation"):
        split(entries[:1], None)


def test_what_sd_scripts_repeats_is_shown_so_often_and_validated_once(tmp_path):
    for folder, name in (("6_a", "p"), ("2_b", "q"), ("2_b", "r")):
        save(tmp_path / folder / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    settings = TrainSettings(data=str(tmp_path), detect="canny", prompt="a bird", validation=1)
    sources = open_sources(settings, (8, 8))
    validated, names = sources.validation.name_of(0), [sources.train.name_of(i) for i in range(len(sources.train))]
    counts = {"p": 3, "q": 1, "r": 1} | {validated[-5]: 0}
    assert {name: sum(path.endswith(f"{name}.png") for path in names) for name in "pqr"} == counts
    assert {entry.caption for entry in sources.train.entries} == {"a bird"}
    assert sources.about.startswith(f"{tmp_path} is read as sd-scripts' folders, some repeated 3 times: 3 pairs, each")


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_by_its_name(name):
    sources = open_sources(TrainSettings(data=name, images=10, seed=3), (64, 64))
    assert len(sources.train) == 10 and len(sources.validation) == 32
    train, held_out = sources.train.sample(4), sources.validation.sample(4)
    assert (
        train.caption == WORLDS[name](64, 3)[4].caption
        and held_out.caption == WORLDS[name](64, 0, held_out=True)[4].caption
    )
    assert np.array_equal(sources.train.hint(4), train.hint)
    assert sources.train.identity() != sources.validation.identity()


def test_the_published_set_comes_before_the_world(tmp_path, monkeypatch):
    (tmp_path / "data" / "fill50k").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert open_sources(TrainSettings(images=10), (64, 64)).train.name == "fill50k"
    for image, hint in fill50k_layout(tmp_path / "data" / "fill50k", 3):
        save(image, np.zeros((64, 64, 3), np.uint8))
        save(hint, np.zeros((64, 64, 3), np.uint8))
    assert open_sources(TrainSettings(images=10), (64, 64)).train.name == "data/fill50k"


@pytest.mark.parametrize(
    "settings, size, words",
    [
        ({"data": "./nowhere"}, (64, 64), '"nowhere" does not exist'),
        ({"data": "shapes"}, (64, 128), "are square, and the size is 128x64"),
        ({"data": "./nowhere", "flip": True}, (64, 64), "add --no-cache"),
        ({"data": "shapes", "flip": True, "label_maps": True}, (64, 64), "leave out --flip, --label-maps"),
        ({"detect": "depth"}, (64, 64), "no hints from images"),
        ({"detect": "canny:lo=5"}, (64, 64), "no option"),
        ({"detect": "none"}, (64, 64), "no detector"),
    ],
)
def test_data_that_cannot_be_as_they_are_asked_for_are_refused(settings, size, words):
    with pytest.raises(ValueError, match=words):
        open_sources(TrainSettings(**settings), size)


def test_label_maps_are_asked_about(tmp_path):
    classes = np.repeat(np.arange(3, dtype=np.uint8), 32)[None].repeat(64, axis=0)
    for image, hint in fill50k_layout(tmp_path, 6):
        save(image, marked(64, 96))
        save(hint, classes)
    with pytest.raises(ValueError, match="source/0.png.* looks like a label map.*segmentation.*--label-maps"):
        open_sources(TrainSettings(data=str(tmp_path), validation=0), (64, 64))
    train = open_sources(TrainSettings(data=str(tmp_path), label_maps=True), (64, 96)).train
    assert np.array_equal(train.hint(0)[..., 0], classes)


def test_a_detector_has_options_and_makes_three_channels(tmp_path):
    for image, _ in fill50k_layout(tmp_path, 2):
        save(image, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    source = FolderSource(
        "x", recognise(tmp_path, Wanted(hints=False)).entries, Transform((64, 64)), 3, "canny:low=255"
    )
    assert not np.array_equal(source.hint(0), detect("canny", source.sample(0).image))
    assert np.array_equal(source.hint(0), detect("canny", source.sample(0).image, low=255))
    with pytest.raises(ValueError, match="hints of 3 channels, and --hint-channels is 1"):
        open_sources(TrainSettings(data=str(tmp_path), detect="canny", hint_channels=1), (64, 64))


def test_a_fingerprint_sees_changed_files_and_captions(tmp_path):
    for image, hint in fill50k_layout(tmp_path, 2):
        save(image, np.zeros((64, 64, 3), np.uint8))
        save(hint, np.zeros((64, 64, 3), np.uint8))

    def current():
        return FolderSource("x", recognise(tmp_path, Wanted()).entries, Transform((64, 64))).identity().fingerprint

    before = current()
    assert current() == before
    save(tmp_path / "target/1.png", np.ones((64, 80, 3), np.uint8))
    found, table = [before, current()], tmp_path / "prompt.json"
    table.write_text(table.read_text().replace("number 1", "number 7"))
    found.append(current())
    (tmp_path / "source").rename(tmp_path / "hints")
    table.write_text(table.read_text().replace("source/", "hints/"))
    assert len({str(fingerprint) for fingerprint in [*found, current()]}) == 4


@pytest.mark.parametrize("name, needs", [(None, False), ("canny:low=5", False), ("softedge", True), ("SAM", True)])
def test_hints_of_networks_are_made_beside_the_device(name, needs):
    assert FolderSource("x", [], Transform((64, 64)), detect=name).uses_network == needs


def test_the_first_images_are_counted_before_they_are_repeated(tmp_path):
    for i, name in enumerate(["10_a", "10_a", "5_b", "5_b"]):
        save(tmp_path / f"{name}/{i}.png", np.zeros((64, 64, 3), np.uint8))
    settings = TrainSettings(data=str(tmp_path), detect="canny", prompt="", validation=0, images=3)
    assert [entry.image.stem for entry in open_sources(settings, (64, 64)).train.entries] == [*"00112"]


@pytest.mark.parametrize("colour", [(0, 0, 200), (250, 240, 60), (255, 255, 255), (0, 0, 0)])
@pytest.mark.parametrize("name", ["scribble", "threshold", "invert", "gray"])
def test_strokes_without_a_ground_are_the_same_hint_wherever_it_is_made(tmp_path, name, colour):
    """In training, for --validate, in make_hints and in infer.py; and coloured strokes are dark ones."""
    drawing = np.zeros((64, 64, 4), np.uint8)
    drawing[30:33, :] = (*colour, 255)
    path = tmp_path / "0.png"
    save(path, drawing)
    hint = FolderSource("x", [Entry(path, None, "")], Transform((64, 64)), detect=name).hint(0)
    (shown,) = own_samples(TrainSettings(validate=[[str(path), ""]], detect=name), (64, 64))
    assert np.array_equal(hint, shown.hint) and np.array_equal(hint, detect_file(name, path))
    assert np.array_equal(hint, to_uint8(HintImage.of(path, name).at((64, 64))[0]))
    if name == "scribble" and colour != (255, 255, 255):
        assert (hint[30:33] == 255).all() and (hint == 255).mean() < 0.05
    elif name == "threshold":
        assert (hint[31] == 255).all() == (min(colour) > 127) and (hint[0] == 255).all() != (min(colour) > 127)


def test_a_corner_cut_from_a_drawing_is_of_its_ground(tmp_path):
    for ground in (0, 255):
        drawing = np.full((64, 64, 4), ground, np.uint8)
        drawing[..., 3] = 255
        drawing[30:33, :, :3] = 255 - ground
        drawing[50:, 50:, 3] = 0
        save(tmp_path / "0.png", drawing)
        assert np.array_equal(
            detect_file("invert", tmp_path / "0.png"), 255 - np.where(drawing[..., 3:], drawing, ground)[..., :3]
        )
