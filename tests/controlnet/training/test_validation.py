"""The validation loss, and whether it depends on the hints."""

import numpy as np
import pytest
import torch
from small import SMALLEST, small_control, small_sd

from controlnet.model import ControlNet
from controlnet.objective import ControlLoss, Draws
from controlnet.training.convergence import Convergence
from controlnet.training.lr_schedules import constant_schedule
from controlnet.training.optimisation import Optimisation
from controlnet.training.validation import ValidationLoss, zero_conv_norms
from controlnet.worlds import WORLDS, Sample

SIZE = (SMALLEST.resolution, SMALLEST.resolution)
LATENT = (4, *(side // 8 for side in SIZE))


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


def validation(sd, samples, batch_size):
    draws = Draws(LATENT, sd.schedule.config.timesteps, 0.5, seed=0)
    return ValidationLoss(sd, samples, draws, sd.encode_text([""]), batch_size)


def samples(count):
    world = WORLDS["people"](SMALLEST.resolution, 0)
    return [world[i] for i in range(count)]


class OfHint(torch.nn.Module):
    """Stands in for the loss: 1 for the hint that belongs to the latents, 1.25 for another."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, z0, noise, t, context, hint):
        right = [torch.equal(self.own[tuple(t.view(-1, 1)[i].tolist())], hint[i]) for i in range(len(hint))]
        return torch.tensor([1.0 if it is True else 1.25 for it in right]).mean()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_every_sample_is_given_anothers_hint_alone(sd, batch_size):
    """Whatever the batches, a last one of a single sample included."""
    made = validation(sd, samples(3), batch_size)
    timesteps = torch.cat([t for _, _, t, _ in made.inputs])
    own = {(int(t),): hint for t, hint in zip(timesteps, made.hints, strict=True)}
    assert len(own) == 3
    assert made(OfHint(own)) == {"validation_loss": 1.0, "control_measure": pytest.approx(0.25)}


def test_the_measure_is_zero_for_a_fresh_control_and_not_for_a_trained_one(sd):
    made = validation(sd, samples(2), 2)
    fresh = made(ControlLoss(sd.unet, ControlNet.from_unet(sd.unet), sd.schedule))
    assert fresh["control_measure"] == 0
    trained = made(ControlLoss(sd.unet, small_control(sd), sd.schedule))
    assert abs(trained["control_measure"]) > 1e-3


def test_a_single_sample_has_no_measure(sd):
    made = validation(sd, samples(1), 2)
    assert made(ControlLoss(sd.unet, small_control(sd), sd.schedule)).keys() == {"validation_loss"}


def test_control_sets_in_where_hints_tell_what_to_paint(sd):
    """A whole little training, on a black and a white image whose hints are the inverse."""
    plain = [np.full((*SIZE, 3), value, np.uint8) for value in (0, 255)]
    pairs = [Sample(image, 255 - image, "") for image in plain]
    made, convergence = validation(sd, pairs, 2), Convergence(steps=15)
    torch.manual_seed(0)
    control = ControlNet.from_unet(sd.unet)
    loss = ControlLoss(sd.unet, control, sd.schedule)
    optimisation = Optimisation(control.named_parameters(), 3e-3, constant_schedule(0), torch.device("cpu"), clip=1.0)
    for step in range(15):
        optimisation.backward(loss(*made.inputs[0], made.hints))
        optimisation.finish(optimisation.update())
        if step % 3 == 2:
            values = made(loss)
            convergence.news(step + 1, values["validation_loss"], values["control_measure"])
    assert convergence.set_in in (6, 9, 12) and values["control_measure"] > 0.03


def test_the_norms_of_zero_convolutions_are_those_of_weight_and_bias(sd):
    control = ControlNet.from_unet(sd.unet)
    torch.nn.init.constant_(control.zero_convs[1].bias, 3.0)
    torch.nn.init.constant_(control.middle_zero_conv.weight, 1.0)
    width = len(control.zero_convs[1].bias)
    want = [0.0] * (len(control.zero_convs) + 1)
    want[1], want[-1] = 3 * width**0.5, len(control.middle_zero_conv.bias)
    assert zero_conv_norms(control) == pytest.approx(want)
