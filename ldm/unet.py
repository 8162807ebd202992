"""The UNet (Ronneberger et al., arXiv 1505.04597) as an encoder and a decoder: epsilon_theta(x_t, t, c) of Rombach et
al., arXiv 2112.10752.

The encoder of SD 1.5 at 512x512 is these twelve blocks and a middle. Each block's output is also a skip connection:

    block  what                      output (C, h, w)
        0  convolution               320, 64, 64
        1  ResBlock, transformer     320, 64, 64
        2  ResBlock, transformer     320, 64, 64
        3  downsample                320, 32, 32
        4  ResBlock, transformer     640, 32, 32
        5  ResBlock, transformer     640, 32, 32
        6  downsample                640, 16, 16
        7  ResBlock, transformer    1280, 16, 16
        8  ResBlock, transformer    1280, 16, 16
        9  downsample               1280,  8,  8
       10  ResBlock                 1280,  8,  8
       11  ResBlock                 1280,  8,  8
   middle  ResBlock, transformer,   1280,  8,  8
           ResBlock

The decoder mirrors it: twelve blocks, each of which first concatenates the last unused skip. A control's residuals may
be added to the twelve skips and to the middle's output, before any of them is concatenated.
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


class ConvBlock(nn.Module):
    """A single convolution: the encoder's first block, and the downsampling at the end of each level but the last."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.conv(x)


class ResTransformerBlock(nn.Module):
    """A residual block, at most levels a transformer, and at the end of a decoder level an upsampling."""

    def __init__(self, config: UNetConfig, c_in: int, level: int, upsample: bool = False):
        super().__init__()
        c_out = config.widths[level]
        self.res = ResBlock(c_in, c_out, config.time_width, config.groups)
        self.transformer = SpatialTransformer(config, level) if config.attention[level] else None
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
        width = config.widths[-1]
        self.res1 = ResBlock(width, width, config.time_width, config.groups)
        self.transformer = SpatialTransformer(config, level=len(config.widths) - 1)
        self.res2 = ResBlock(width, width, config.time_width, config.groups)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.res2(self.transformer(self.res1(x, time), context), time)


class Checkpointed(nn.Module):
    """Mixin: gradient checkpointing (Chen et al., arXiv 1604.06174)."""

    checkpointing = False

    def run_checkpointed(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing in a block is random, and CUDA graphs allow no look at random states.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Gradient checkpointing for every part of `model` that supports it: each block then keeps only its input, and is
    run again in the backward pass."""
    for module in model.modules():
        if isinstance(module, Checkpointed):
            module.checkpointing = on


@dataclass(frozen=True)
class Encoded:
    """What the encoder hands over to the decoder."""

    skips: list[Tensor]  # one per block, (B, C, h, w) each as in the table above
    middle: Tensor  # (B, C, h, w)
    time: Tensor  # (B, T)


def add_residuals(encoded: Encoded, residuals: Sequence[Tensor] | None) -> Encoded:
    """One for each skip in the encoder's order, the middle's last; a new `Encoded`, nothing is changed in place."""
    if residuals is None:
        return encoded
    skips = [skip + residual for skip, residual in zip(encoded.skips, residuals[:-1], strict=True)]
    return Encoded(skips, encoded.middle + residuals[-1], encoded.time)


class UNetEncoder(Checkpointed):
    """The first half of the UNet: time embedding, blocks and middle."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_embedding = TimeEmbedding(config.channels, config.time_width)
        self.blocks = nn.ModuleList([ConvBlock(nn.Conv2d(config.input_channels, config.channels, 3, padding=1))])
        self.skip_widths = [config.channels]  # the C of each block's output
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks):
                self.blocks.append(ResTransformerBlock(config, self.skip_widths[-1], level))
                self.skip_widths.append(width)
            if level < len(config.widths) - 1:
                self.blocks.append(ConvBlock(Downsample(width)))
                self.skip_widths.append(width)
        self.middle = MiddleBlock(config)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Encoded:
        """x (B, 4, h, w), t (B,), context (B, M, D)."""
        time = self.time_embedding(t)
        skips = []
        for block in self.blocks:
            x = self.run_checkpointed(block, x, time, context)
            skips.append(x)
        return Encoded(skips, self.run_checkpointed(self.middle, x, time, context), time)


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
        """Runs `blocks`, all of the decoder's or a part, concatenating one skip connection to each input; skips are in
        the encoder's order."""
        for block, skip in zip(blocks, reversed(skips), strict=True):
            x = self.run_checkpointed(block, torch.cat([x, skip], dim=1), time, context)
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
        """The raw output (B, 4, h, w): eps, v or x0, as the schedule says.

        x (B, 4, h, w) or, for inpainting models, (B, 9, h, w): the latents, the mask (1 is made anew) and the masked
        image's latents; t (B,), context (B, M, D). `control` are residuals for the skips and the middle, as a
        ControlNet gives them.
        """
        return self.decode(self.encoder(x, t, context), context, control)

    def decode(self, encoded: Encoded, context: Tensor, control: Sequence[Tensor] | None = None) -> Tensor:
        """The second half of `forward`, for callers that run the encoder separately (without gradients, or once)."""
        encoded = add_residuals(encoded, control)
        return self.decoder(encoded.middle, encoded.skips, encoded.time, context)
