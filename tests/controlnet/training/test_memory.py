"""What a run will need, against what is known of its parts and what the same step really allocates."""

from dataclasses import replace

import pytest
import torch
from small import SMALL

from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from controlnet.training.memory import Memory, StorageCounter, predict, table
from controlnet.training.options import PAPER, TrainSettings
from controlnet.training.resolve import control_config
from ldm import StableDiffusion
from ldm.unet import set_checkpointing

SIZE = (64, 64)
TWO_LEVELS = replace(SMALL.unet, multipliers=(1, 2), attention=(False, True), heads=(2, 2))
SHALLOW = replace(SMALL, unet=TWO_LEVELS)  # what is fake takes time by the layer, not by its size


def predicted(config=SHALLOW, **settings):
    settings = TrainSettings(**{**PAPER, "batch_size": 1, **settings})
    return predict(config, settings, SIZE, control_config(settings))


def test_weights_gradients_and_moments_are_what_they_are():
    sd = StableDiffusion(SHALLOW)
    trained = sum(p.numel() for p in ControlNet.from_unet(sd.unet).parameters())
    unet = sum(p.numel() for p in sd.unet.parameters())
    encoders = sum(p.numel() for part in (sd.vae, sd.text_encoder) for p in part.parameters())
    full, half = predicted(), predicted(precision="fp16", no_cache=True, ema=0.9)
    assert (full.trained, full.copy, full.gradients, full.optimizer) == (trained, 4 * trained, 4 * trained, 8 * trained)
    assert (full.base, full.encoders, full.encoding) == (4 * unet, 0, 0)
    assert (half.base, half.encoders, half.copy) == (2 * unet, 2 * encoders, 8 * trained) and half.encoding > 0
    assert full.peak == full.base + full.copy + full.optimizer + full.gradients + full.activations
    unlocked = predicted(precision="fp16", sd_unlocked=True)
    assert unlocked.trained > full.trained and unlocked.gradients == 4 * unlocked.trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_step_holds_what_the_real_one_holds(checkpointing):
    """The counter's figure for real tensors is that for fake ones."""
    sd = StableDiffusion(SHALLOW).requires_grad_(False)
    net = ControlNet.from_unet(sd.unet)
    for model in (sd.unet, net):
        set_checkpointing(model, checkpointing)
    loss = ControlLoss(sd.unet, net, sd.schedule)
    with StorageCounter() as counter:
        z0, context = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, TWO_LEVELS.context_width)
        loss(z0, torch.zeros_like(z0), torch.zeros(2, dtype=torch.int64), context, torch.zeros(2, 3, 64, 64)).backward()
    memory = predicted(batch_size=2, checkpointing=checkpointing)
    assert memory.gradients + memory.activations == pytest.approx(counter.most, rel=0.02)


def test_the_counter_sees_what_comes_and_goes():
    weight = torch.ones(50, 50)
    with StorageCounter() as counter:
        w = weight.t().detach()  # there before
        assert counter.now == 0 and w.shape == (50, 50)
        a = torch.zeros(1000)
        b = a.view(10, 100)  # the same storage
        c = b + 1
        assert counter.now == 8000
        del c
        assert counter.now == 4000
        del a, b
    assert (counter.now, counter.most) == (0, 8000)


def test_every_saving_saves():
    deep = replace(SMALL, unet=replace(TWO_LEVELS, blocks=3))
    plain = predicted(deep, batch_size=4)
    assert predicted(deep, batch_size=4, checkpointing=True).activations < 0.9 * plain.activations
    half = predicted(deep, batch_size=4, precision="fp16", optimizer="adamw8bit")
    assert half.activations < 0.7 * plain.activations and half.optimizer * 4 == plain.optimizer
    muon = predicted(deep, batch_size=4, optimizer="muon")
    assert 0.5 * plain.optimizer < muon.optimizer < 0.6 * plain.optimizer  # one moment, but for norms and biases


def test_every_item_is_told_in_gigabytes():
    text = table(Memory(*(int(x * 1e9) for x in (1, 2, 3, 4, 5, 6, 7)), trained=1))
    figures = [float(line.split()[-2]) for line in text.splitlines()]
    assert figures == [1, 2, 3, 5, 4, 6, 21]
