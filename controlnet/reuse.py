"""Faster, approximate sampling: the UNet and the ControlNets are computed in full only at every Nth step.

From one step to the next the deep features of a UNet change little. DeepCache (Ma et al., arXiv 2312.00858) computes
between such key steps only the first block of the encoder and the last of the decoder, which see x and give the output:
6 % of a controlled step of SD 1.5 at 512x512. It keeps the deep features, those that enter the last block; here the
residual that the ControlNets add to the first block is kept as well.

Unlike in DeepCache, features are extrapolated from the last two key steps, not reused unchanged. That costs nothing
and brings the image nearer to the exact one. The extrapolation is damped by a half: undamped it is nearer still with
DDIM but further off with DDPM, whose noise it would follow, too.

Shapes: B batch, C channels, h w positions; x (B, 4, h, w), t (B,), context (B, M, D).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.unet import UNet, add_residuals

from .guidance import Branch, Predict, PreparedControl, total_residuals

DAMPING = 0.5


def reusing(every: int) -> Callable[[UNet], Predict]:
    """A `make_predictor` of `guided` that computes every `every`th step in full.

    Raises ValueError for less than 1.
    """
    if every < 1:
        raise ValueError(f"reuse is {every}, expected 1 (every step is computed in full) or more")
    return lambda unet: Reusing(unet, every)


class Reusing:
    """Computes one branch of the guidance, in full at key steps and approximately in between.

    A key step is the first of an image, the first after other controls began to act, and every Nth from there on.
    """

    def __init__(self, unet: UNet, every: int):
        self.unet, self.every = unet, every
        self.kept: list[tuple[float, list[Tensor]]] = []  # of the last two key steps: timestep and features
        self.timestep, self.controls, self.since_key = -1, [], 0

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        timestep: float,
        context: Tensor,
        controls: Sequence[PreparedControl],
        branch: Branch,
    ) -> Tensor:
        if not self.advance(timestep, list(controls)):
            return self.approximate(x, t, context, self.extrapolated())
        residuals = total_residuals(x, t, context, controls, branch)
        output, features = self.full(x, t, context, residuals)
        self.kept = [*self.kept[-1:], (self.timestep, features)]
        return output

    def advance(self, timestep: float, controls: list[PreparedControl]) -> bool:
        """To the next evaluation -> whether it is a key step's."""
        # Sampling goes from high to low timesteps; some samplers look twice at one.
        new_image = timestep > self.timestep
        if new_image or controls != self.controls:
            self.kept, self.since_key = [], 0
        else:
            self.since_key = (self.since_key + 1) % self.every
        self.timestep, self.controls = timestep, controls
        return self.since_key == 0

    def full(
        self, x: Tensor, t: Tensor, context: Tensor, residuals: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The UNet's output, to the bit, and what is kept: the deep features (B, C, h, w) and the first residual."""
        encoded = add_residuals(self.unet.encoder(x, t, context), residuals)
        decoder, (skip, *skips) = self.unet.decoder, encoded.skips
        deep = decoder.up(decoder.blocks[:-1], encoded.middle, skips, encoded.time, context)
        output = decoder.output(decoder.up(decoder.blocks[-1:], deep, [skip], encoded.time, context))
        return output, [deep, *(residuals or [])[:1]]

    def approximate(self, x: Tensor, t: Tensor, context: Tensor, features: list[Tensor]) -> Tensor:
        encoder, decoder, (deep, *residual) = self.unet.encoder, self.unet.decoder, features
        time = encoder.time_embedding(t)
        skip = sum(residual, encoder.blocks[0](x, time, context))
        return decoder.output(decoder.up(decoder.blocks[-1:], deep, [skip], time, context))

    def extrapolated(self) -> list[Tensor]:
        """The last key step's features, moved along the line through the last two, damped."""
        (before, old), (last, new) = self.kept[0], self.kept[-1]
        if before == last:
            return new
        further = DAMPING * (self.timestep - last) / (last - before)
        return [torch.lerp(a, b, 1 + further) for a, b in zip(old, new, strict=True)]
