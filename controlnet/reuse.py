"""Faster, approximate sampling: the UNet and the ControlNets are computed in full at every Nth step only.

From one step to the next the deep features of a UNet change little. DeepCache (Ma et al., arXiv 2312.00858) computes
between such key steps only the first block of the encoder and the last of the decoder, which between them see x and
give the output: 6 % of a controlled step of SD 1.5 at 512x512. The deep features, those that enter the last block, are
kept; here also the residual that the ControlNets add to the first block.

Unlike in the paper they are not taken as they were: the line through the last two key steps is followed on, half as
far as it leads. That costs nothing and brings the picture nearer to the exact one. The whole way is nearer still with
DDIM, but further off with DDPM, whose noise would be followed, too.

Shapes: B batch, C channels, h w positions; x (B, 4, h, w), t (B,), context (B, M, D).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ldm.unet import UNet, add_control

# Residuals are asked for where they are needed: computing them is what a step between key steps saves.
Residuals = Callable[[], list[Tensor] | None]
Evaluate = Callable[[Tensor, Tensor, Tensor, Residuals], Tensor]


def check_reuse(reuse: int) -> None:
    """Raises ValueError for what is no distance between key steps."""
    if reuse < 1:
        raise ValueError(f"reuse is {reuse}, expected 1 (every step is computed in full) or more")


def in_full(unet: UNet) -> Evaluate:
    """The exact way, with the UNet as it is."""
    return lambda x, t, context, residuals: unet(x, t, context, residuals())


class Reusing:
    """evaluate(x, t, context, residuals) -> the UNet's raw output (B, 4, h, w), in full or approximate by t.

    `spans` are the timesteps of the sampling, in its order and cut where other controls begin to act; t must be one of
    them. Each span begins with a key step and knows nothing of those before it, so neither does a picture, which begins
    with the first span. One object serves one branch of the guidance.
    """

    def __init__(self, unet: UNet, spans: Iterable[Sequence[int]], every: int):
        spans = list(spans)
        self.unet = unet
        self.first_steps = {span[0] for span in spans}
        self.key_steps = {timestep for span in spans for timestep in span[::every]}
        self.kept: list[tuple[int, list[Tensor]]] = []  # of the last two key steps: timestep, features

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, residuals: Residuals) -> Tensor:
        timestep = int(t[0])
        if timestep in self.first_steps:
            self.kept = []
        if timestep not in self.key_steps:
            return self.approximate(x, t, context, self.followed_to(timestep))
        output, features = self.exact(x, t, context, residuals())
        self.kept = [*self.kept[-1:], (timestep, features)]
        return output

    def exact(self, x: Tensor, t: Tensor, context: Tensor, control: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """The output, to the bit, and what is kept of the way: deep features (B, C, h, w) and, with a control, the
        first residual."""
        encoded = add_control(self.unet.encoder(x, t, context), control)
        decoder, (skip, *skips) = self.unet.decoder, encoded.skips
        deep = decoder.up(decoder.blocks[:-1], encoded.middle, skips, encoded.time, context)
        output = decoder.output(decoder.up(decoder.blocks[-1:], deep, [skip], encoded.time, context))
        return output, [deep, *(control or [])[:1]]

    def approximate(self, x: Tensor, t: Tensor, context: Tensor, features: list[Tensor]) -> Tensor:
        encoder, decoder, (deep, *residual) = self.unet.encoder, self.unet.decoder, features
        time = encoder.time_embedding(t)
        skip = sum(residual, encoder.blocks[0](x, time, context))
        return decoder.output(decoder.up(decoder.blocks[-1:], deep, [skip], time, context))

    def followed_to(self, timestep: int) -> list[Tensor]:
        """Half the way from the last key step's features on the line through the last two, if there were two."""
        (before, old), (last, new) = self.kept[0], self.kept[-1]
        if before == last:
            return new
        further = 0.5 * (timestep - last) / (last - before)
        return [torch.lerp(a, b, 1 + further) for a, b in zip(old, new, strict=True)]
