"""Batches: latents computed once, hints and captions that belong to them, prompts dropped."""

import numpy as np
import pytest
import torch
from small import SMALL, small_sd

from controlnet.data import LatentPairs, drop_prompts, seeded
from controlnet.images import to_hints, to_images
from controlnet.worlds import Fill50k


@pytest.fixture(scope="module")
def sd():
    return small_sd()


def test_latents_hints_and_captions_of_a_batch_belong_together(sd):
    world = Fill50k(SMALL.resolution)
    batch = LatentPairs(world, 5, sd, chunk=2).batch([4, 0, 4])
    assert batch.captions == [world[4].caption, world[0].caption, world[4].caption]
    assert torch.equal(batch.hints, to_hints([world[4].hint, world[0].hint, world[4].hint]))
    want = sd.encode(to_images([world[4].image, world[0].image]), sample=False)
    torch.testing.assert_close(batch.latents[:2], want, rtol=1e-3, atol=1e-4)
    assert torch.equal(batch.latents[0], batch.latents[2])


def test_pictures_become_tensors_in_the_range_of_their_use():
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[0, 1] = (255, 51, 0)
    hint, image = to_hints([picture]), to_images([picture])
    assert hint.shape == image.shape == (1, 3, 2, 4)
    assert hint[0, :, 0, 1].tolist() == pytest.approx([1, 0.2, 0])
    assert image[0, :, 0, 1].tolist() == pytest.approx([1, -0.6, -1])


def test_half_of_the_prompts_are_dropped_and_the_others_stay():
    captions = [f"prompt {i}" for i in range(2000)]
    dropped = drop_prompts(captions, 0.5, seeded(0))
    assert 0.45 < dropped.count("") / 2000 < 0.55
    assert all(new in ("", old) for new, old in zip(dropped, captions, strict=True))
    assert drop_prompts(captions, 0.0, seeded(0)) == captions and not any(drop_prompts(captions, 1.0, seeded(0)))


def test_a_step_draws_the_same_whatever_was_drawn_before():
    first = torch.randn(3, generator=seeded(1, 5))
    assert torch.equal(first, torch.randn(3, generator=seeded(1, 5)))
    assert not torch.equal(first, torch.randn(3, generator=seeded(5, 1)))
    assert not torch.equal(first, torch.randn(3, generator=seeded(1, 6)))
