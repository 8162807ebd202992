"""What a ControlNet in training can do by now, on pairs that are not trained on: their loss, whether it depends on the
hints, and grids of what is made of these."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from controlnet.common.devices import temporarily_on
from controlnet.common.images import to_hints, to_images
from controlnet.common.program import note
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss, Draws, loss_inputs
from controlnet.worlds import Sample
from ldm.stable_diffusion import StableDiffusion

from .intervals import Interval
from .latent_cache import encode
from .options import TrainSettings
from .previews import Preview
from .run_state import RunFolder


class Validation:
    """At intervals the loss on validation pairs, if there are any, and a grid of `shown` samples."""

    def __init__(
        self,
        sd: StableDiffusion,
        pairs: Sequence[Sample],
        shown: Sequence[Sample],
        draws: Draws,
        empty_prompt: Tensor,
        settings: TrainSettings,
    ):
        if not pairs:
            print("there are no validation pairs: no validation loss, and the grids show images that are trained on")
        self.sd, self.run = sd, RunFolder(settings.out)
        self.loss = ValidationLoss(sd, pairs, draws, empty_prompt, settings.batch_size) if pairs else None
        self.preview = Preview(sd, shown, settings.batch_size) if shown else None
        self.losses, self.grids = Interval(settings.validate_every), Interval(settings.sample_every)

    def __call__(self, done: int, loss: ControlLoss, saving: bool, last: bool) -> dict:
        """What is logged after `done` steps of the ControlNet in `loss`. Each save is validated, to know the best,
        except that of a run that is being stopped."""
        values = {}
        if self.loss and (self.losses.due(done) or saving or last):
            values |= {**self.loss(loss), "zero_convs": zero_conv_norms(loss.control)}
        if self.preview and (self.grids.due(done) or last):
            grid = self.run.grid(done)
            with temporarily_on(self.sd.device, self.sd.vae, self.sd.text_encoder):
                try:
                    values |= {**self.preview.save(loss.control, grid), "grid": grid.name}
                except FloatingPointError as error:  # half precision may overflow: no reason to end the run
                    note(f"there is no grid of step {done}: {error}")
        return values


class ValidationLoss:
    """The loss on validation samples, always with the same noise and the same timesteps, spread evenly: its values can
    be compared from step to step, where the training loss jumps with the timesteps that were drawn."""

    def __init__(
        self, sd: StableDiffusion, samples: Sequence[Sample], draws: Draws, empty_prompt: Tensor, batch_size: int
    ):
        self.inputs, hints, self.batch_size = [], [], batch_size
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            numbers = range(start, start + len(batch))
            t = torch.tensor([int((number + 0.5) / len(samples) * draws.timesteps) for number in numbers])
            drawn = draws(numbers)._replace(t=t, dropped=torch.zeros(len(batch), dtype=torch.bool))
            encoded = encode(sd, to_images(sample.image for sample in batch), [sample.caption for sample in batch])
            hint = to_hints(sample.hint for sample in batch)
            *inputs, hint = loss_inputs(encoded, hint, drawn, sd.vae.config.scale, empty_prompt, sd.device)
            self.inputs.append(inputs)
            hints.append(hint)
        self.hints = torch.cat(hints)  # (N, C, H, W)

    def __call__(self, loss: ControlLoss) -> dict[str, float]:
        """The loss, and the control measure: by which share of it the loss is higher where each sample is given the
        hint of the next one, all else being equal. It is 0 as long as the hint does not count. A single sample has no
        such measure."""
        right = self.mean(loss, self.hints)
        values = {"validation_loss": right}
        if len(self.hints) > 1:
            values["control_measure"] = self.mean(loss, self.hints.roll(-1, 0)) / right - 1
        return values

    @torch.no_grad()
    def mean(self, loss: ControlLoss, hints: Tensor) -> float:
        """Over all samples, each with its own of these hints (N, C, H, W)."""
        batches = hints.split(self.batch_size)
        values = [loss(*inputs, hint).item() for inputs, hint in zip(self.inputs, batches, strict=True)]
        return float(np.average(values, weights=[len(hint) for hint in batches]))


def zero_conv_norms(control: ControlNet) -> list[float]:
    """The norm of each output's zero convolution, the middle's last. It grows when control sets in, which the loss
    hardly shows."""
    convs = [*control.zero_convs, control.middle_zero_conv]
    return [float(nn.utils.get_total_norm(p.detach() for p in conv.parameters())) for conv in convs]
