"""Grids of images: made in batches, each image as if it were alone."""

import numpy as np
import pytest
from PIL import Image
from small import SMALL, small_control, small_sd

from controlnet.common.images import to_hints
from controlnet.config import ControlConfig
from controlnet.guidance import Control
from controlnet.inference.generate import generate
from controlnet.training.options import TrainSettings
from controlnet.training.previews import Preview, own_samples
from controlnet.worlds import WORLDS

SIDE = SMALL.resolution


@pytest.fixture(scope="module")
def sd():
    return small_sd()


def test_a_batch_of_previews_is_each_made_alone(sd, tmp_path):
    """Other hints, prompts and seeds, and a last batch that is not full."""
    control, world, calls = small_control(sd), WORLDS["people"](SIDE, 0), []
    samples = [world[i] for i in range(3)]
    handle = sd.unet.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    Preview(sd, samples, batch_size=2, steps=2).save(control, tmp_path / "grid.png")
    handle.remove()
    assert calls == [4, 4, 2, 2]  # both branches of the guidance, two steps
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    shown = [grid[i * SIDE : (i + 1) * SIDE, SIDE : 2 * SIDE].astype(int) for i in range(3)]
    alone = []
    for seed, sample in enumerate(samples):
        (image,) = generate(sd, sample.caption, [Control(control, to_hints([sample.hint]))], seed=seed, steps=2)
        alone.append(np.asarray(image).astype(int))
    for image, wanted in zip(shown, alone, strict=True):
        assert np.abs(image - wanted).max() <= 1
    assert min(np.abs(alone[i] - alone[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 20


def test_noise_is_each_images_own(sd):
    """Two alike but for the seed are two images."""
    control, sample = small_control(sd), WORLDS["fill50k"](SIDE, 0)[0]
    first, second = Preview(sd, [sample, sample], batch_size=2, steps=1).images(control)
    assert not np.array_equal(first, second)


def test_a_pooled_control_acts_as_infer_uses_it(sd):
    """On the prompt's branch alone, as the shuffle model is published."""
    control, sample = small_control(sd), WORLDS["people"](SIDE, 0)[0]
    control.config = ControlConfig(global_average_pooling=True)
    used = Control.from_image(control, sample.hint)
    (wanted,) = generate(sd, sample.caption, [used], steps=1)
    (one,) = Preview(sd, [sample], batch_size=1, steps=1).images(control)
    assert used.prompt_only and np.abs(one.astype(int) - np.asarray(wanted)).max() <= 1


def test_hints_of_ones_own_are_cut_and_made_as_those_of_the_data(tmp_path):
    """To cover the size, in the middle; by the detector, of an image at that size; in as many channels."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 48:] = 255
    Image.fromarray(pixels).save(tmp_path / "hint.png")
    np.save(tmp_path / "hint.npy", pixels[..., [0, 0, 1, 2, 2]])
    file = str(tmp_path / "hint.png")
    (sample, other) = own_samples(TrainSettings(validate=[[file, "a"], [file, ""]]), (64, 64))
    assert (sample.caption, other.caption, sample.image.min()) == ("a", "", 255)
    assert sample.hint.shape == (64, 64, 3) and sample.hint[:, :22].max() == 0 and sample.hint[:, 42:].min() == 255
    assert sample.hint[0, 29, 0] < 30 and sample.hint[0, 34, 0] > 220
    (edges,) = own_samples(TrainSettings(validate=[[file, "a"]], detect="canny"), (64, 64))
    assert (edges.hint[:, 28:36].max(), edges.hint[:, :28].max(), edges.hint[:, 36:].max()) == (255, 0, 0)
    (gray,) = own_samples(TrainSettings(validate=[[file, "a"]], hint_channels=1), (64, 64))
    (five,) = own_samples(TrainSettings(validate=[[str(tmp_path / "hint.npy"), "a"]], hint_channels=5), (64, 64))
    assert gray.hint.shape == (64, 64, 1) and five.hint.shape == (64, 64, 5)
    with pytest.raises(ValueError, match="nowhere.png"):
        own_samples(TrainSettings(validate=[["nowhere.png", "a"]]), (64, 64))
