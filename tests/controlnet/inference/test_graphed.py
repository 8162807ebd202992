"""CUDA graphs around UNet and ControlNets: what is recorded when, and that a replay computes what is asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import SMALLEST, small_control, small_sd
from tape import record_on_tapes

from controlnet.guidance import Control, exact, guided
from controlnet.inference import predictors
from controlnet.inference.generate import generate
from controlnet.inference.predictors import graphed, predictor_for


@pytest.fixture
def tapes(monkeypatch):
    return record_on_tapes(monkeypatch)


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


@pytest.fixture(scope="module")
def control(sd):
    hint = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Control(small_control(sd), hint, start=0.5)


def images(sd, control, monkeypatch, make_predictor, **settings):
    monkeypatch.setattr("controlnet.inference.predictors.exact", make_predictor)
    made = generate(sd, "a", [control], negative="b", steps=6, cfg=2.5, **settings)
    return [np.asarray(image) for image in made]


@pytest.mark.parametrize(
    "device, in_parts, wanted", [("cuda", False, graphed), ("cuda", True, exact), ("cpu", False, exact)]
)
def test_graphs_are_for_whole_images_on_cuda(device, in_parts, wanted):
    sd = SimpleNamespace(device=torch.device(device))
    assert predictor_for(sd, 1, compile=False, low_memory=False, in_parts=in_parts) is wanted


def test_replayed_steps_are_those_that_are_computed(sd, control, tapes, monkeypatch):
    """With the control and without it: two recordings, each of a first step that two replays follow."""
    wanted = images(sd, control, monkeypatch, exact)
    assert np.array_equal(images(sd, control, monkeypatch, graphed), wanted)
    assert [tape.replays for tape in tapes] == [2, 2]


def test_a_replay_leaves_alone_what_the_one_before_it_gave(sd, tapes):
    context, t = torch.randn(2, 1, sd.config.text.positions, sd.config.unet.context_width), torch.tensor([5])
    denoise = guided(sd.unet, *context, cfg=1.0, make_predictor=graphed)
    plain = guided(sd.unet, *context, cfg=1.0)
    x = torch.randn(3, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [denoise(one, t, 5) for one in x]
        assert all(torch.equal(output, plain(one, t, 5)) for output, one in zip(outputs, x, strict=True))


def test_batches_that_keep_the_gpu_busy_are_not_recorded(sd, control, tapes, monkeypatch):
    positions = (32 // sd.config.vae.downscale) ** 2
    monkeypatch.setattr(predictors, "MOST_POSITIONS", 2 * 2 * positions)
    wanted = images(sd, control, monkeypatch, exact, count=3, batch_size=2)
    assert np.array_equal(images(sd, control, monkeypatch, graphed, count=3, batch_size=2), wanted)
    assert len(tapes) == 4  # of a batch of two and one of one
    tapes.clear()
    images(sd, control, monkeypatch, graphed, count=3, batch_size=3)
    assert not tapes
