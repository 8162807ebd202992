"""Grids of images: made in batches, each image as if it were alone."""

import numpy as np
import pytest
from PIL import Image
from small import SMALL, small_control, small_sd

from controlnet.training.previews import Preview, image_for
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
    alone = [image_for(sd, control, sample, seed, steps=2).astype(int) for seed, sample in enumerate(samples)]
    for image, wanted in zip(shown, alone, strict=True):
        assert np.abs(image - wanted).max() <= 1
    assert min(np.abs(alone[i] - alone[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 20


def test_noise_is_each_images_own(sd):
    """Two alike but for the seed are two images."""
    control, sample = small_control(sd), WORLDS["fill50k"](SIDE, 0)[0]
    first, second = Preview(sd, [sample, sample], batch_size=2, steps=1).images(control)
    assert not np.array_equal(first, second)
