"""The UNet as an encoder and a decoder: epsilon_theta(x_t, t, c) of Rombach et al., arXiv 2112.10752.

The encoder of SD 1.5 at 512x512 is these twelve blocks and a middle. Each block's output is also a skip connection,
so a ControlNet has twelve zero convolutions, one a row, and one more for the middle:

    block  what                      output (C, h, w)
        0  convolution               320, 64, 64
        1  residual, transformer     320, 64, 64
        2  residual, transformer     320, 64, 64
        3  downsample                320, 32, 32
        4  residual, transformer     640, 32, 32
        5  residual, transformer     640, 32, 32
        6  downsample                640, 16, 16
        7  residual, transformer    1280, 16, 16
        8  residual, transformer    1280, 16, 16
        9  downsample               1280,  8,  8
       10  residual                 1280,  8,  8
       11  residual                 1280,  8,  8
   middle  residual, transformer,   1280,  8,  8
           residual

The decoder mirrors it: twelve blocks, each of which first takes the last skip that is left.
Shapes: B batch, C channels, h w positions, M prompt tokens, D context width, T width of the time embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import SpatialTransformer
from .blocks import Downsample, ResBlock, TimeEmbedding, Upsample, norm_silu
from .config import UNetConfig


def transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.widths[level],
        config.context_width,
        config.heads[level],
        config.groups,
        config.linear_projections,
        config.fp32_logits,
    )


class ConvBlock(nn.Module):
    """A block of convolution alone: the first of the encoder, and the last of each level but the coarsest."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.conv(x)


class ResTransformerBlock(nn.Module):
    """A residual block, at most levels a transformer, and at the end of a decoder level the way up."""

    def __init__(self, config: UNetConfig, c_in: int, level: int, upsample: bool = False):
        super().__init__()
        c_out = config.widths[level]
        self.res = ResBlock(c_in, c_out, config.time_width, config.groups)
        self.transformer = transformer(config, level) if config.attention[level] else None
        self.upsample = Upsample(c_out) if upsample else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.res(x, time)
        if self.transformer is not None:
            x = self.transformer(x, context)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class MiddleBlock(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        level, width = len(config.widths) - 1, config.widths[-1]
        self.res1 = ResBlock(width, width, config.time_width, config.groups)
        self.transformer = transformer(config, level)
        self.res2 = ResBlock(width, width, config.time_width, config.groups)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.res2(self.transformer(self.res1(x, time), context), time)


class Checkpointed(nn.Module):
    """What can trade time for memory: see `set_checkpointing`."""

    checkpointing = False

    def run(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Gradient checkpointing for every encoder and decoder inside `model` (a UNet, a ControlNet).

    Each block, and a ControlNet's hint encoder as a whole, then keeps only its input and is run again in the backward
    pass (Chen et al., arXiv 1604.06174).
    """
    for module in model.modules():
        if isinstance(module, Checkpointed):
            module.checkpointing = on


@dataclass(frozen=True)
class Encoded:
    """What the encoder hands over to the decoder."""

    skips: list[Tensor]  # one a block, (B, C, h, w) each as in the table above
    middle: Tensor  # (B, C, h, w)
    time: Tensor  # (B, T)


def add_control(encoded: Encoded, control: Sequence[Tensor] | None) -> Encoded:
    """With a ControlNet's residuals added, one for each skip and the middle's last."""
    if control is None:
        return encoded
    skips = [skip + residual for skip, residual in zip(encoded.skips, control[:-1], strict=True)]
    return Encoded(skips, encoded.middle + control[-1], encoded.time)


class UNetEncoder(Checkpointed):
    """The half of the UNet that a ControlNet copies: time embedding, blocks and middle."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_embedding = TimeEmbedding(config.channels, config.time_width)
        self.blocks = nn.ModuleList([ConvBlock(nn.Conv2d(config.latent_channels, config.channels, 3, padding=1))])
        self.skip_widths = [config.channels]  # the C of each block's output
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks):
                self.blocks.append(ResTransformerBlock(config, self.skip_widths[-1], level))
                self.skip_widths.append(width)
            if level < len(config.widths) - 1:
                self.blocks.append(ConvBlock(Downsample(width)))
                self.skip_widths.append(width)
        self.middle = MiddleBlock(config)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint_features: Tensor | None = None) -> Encoded:
        """x (B, 4, h, w), t (B,), context (B, M, D); a ControlNet's copy adds `hint_features`, (1 or B,
        C, h, w), after block 0."""
        time = self.time_embedding(t)
        skips = []
        for i, block in enumerate(self.blocks):
            x = self.run(block, x, time, context)
            if i == 0 and hint_features is not None:
                x = x + hint_features
            skips.append(x)
        return Encoded(skips, self.run(self.middle, x, time, context), time)


class UNetDecoder(Checkpointed):
    def __init__(self, config: UNetConfig, skip_widths: Sequence[int]):
        super().__init__()
        skip_widths = list(skip_widths)
        width = config.widths[-1]
        self.blocks = nn.ModuleList()
        for level in reversed(range(len(config.widths))):
            for i in range(config.blocks + 1):
                upsample = i == config.blocks and level > 0
                self.blocks.append(ResTransformerBlock(config, width + skip_widths.pop(), level, upsample))
                width = config.widths[level]
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def forward(self, middle: Tensor, skips: Sequence[Tensor], time: Tensor, context: Tensor) -> Tensor:
        return self.output(self.up(self.blocks, middle, skips, time, context))

    def up(
        self, blocks: Sequence[nn.Module], x: Tensor, skips: Sequence[Tensor], time: Tensor, context: Tensor
    ) -> Tensor:
        """x through some of the blocks in turn, with a skip for each, in the encoder's order."""
        for block, skip in zip(blocks, reversed(skips), strict=True):
            x = self.run(block, torch.cat([x, skip], dim=1), time, context)
        return x

    def output(self, x: Tensor) -> Tensor:
        return self.conv_out(norm_silu(self.norm_out, x))


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.encoder = UNetEncoder(config)
        self.decoder = UNetDecoder(config, self.encoder.skip_widths)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, control: Sequence[Tensor] | None = None) -> Tensor:
        """The raw output (B, 4, h, w): noise, v or x0, as the schedule says.

        x (B, 4, h, w), t (B,), context (B, M, D). `control` holds a ControlNet's residuals, one for each skip in the
        encoder's order and the middle's last; nothing in it is changed.
        """
        return self.decode(self.encoder(x, t, context), context, control)

    def decode(self, encoded: Encoded, context: Tensor, control: Sequence[Tensor] | None = None) -> Tensor:
        """The second half of `forward`, for callers that run the encoder on their own (without gradients, or once)."""
        encoded = add_control(encoded, control)
        return self.decoder(encoded.middle, encoded.skips, encoded.time, context)
