"""The small models that ship do what their model card says, on a few of the held-out hints that it was measured on."""

import numpy as np
import pytest

from controlnet import ControlNet
from controlnet.training.previews import images_for
from controlnet.worlds import TINY_CONTROL_OF, WORLDS
from controlnet.worlds.colours import BASIC_COLOURS
from ldm import StableDiffusion
from ldm.checkpoints.published import WEIGHTS


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load("tiny")


@pytest.mark.parametrize("name", TINY_CONTROL_OF)
def test_pictures_follow_their_hints_and_prompts(sd, name):
    """Their hints say what is where, their prompts in which colours: so each is nearer to its own truth than to any
    other's, and much nearer than the others are."""
    control = ControlNet.load(WEIGHTS / f"{TINY_CONTROL_OF[name]}.safetensors", sd.unet)
    world = WORLDS[name](sd.config.resolution, colours=BASIC_COLOURS, held_out=True)
    samples = [world[i] for i in range(4)]
    pictures = np.stack(images_for(sd, control, samples, seed=0, steps=8)).astype(float)  # (4, H, W, 3)
    truths = np.stack([sample.image for sample in samples])
    distances = np.abs(pictures[:, None] - truths).mean(axis=(2, 3, 4))  # (picture, truth), in levels of 255
    own, others = np.diagonal(distances), distances[~np.eye(4, dtype=bool)]
    print(name, own, others)
    assert (distances.argmin(axis=1) == range(4)).all() and own.mean() < 0.5 * others.mean()


def test_they_are_small_enough_to_ship():
    assert sum(path.stat().st_size for path in WEIGHTS.glob("tiny*.safetensors")) < 75e6
