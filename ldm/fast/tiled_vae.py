"""The autoencoder in horizontal strips: the same numbers as vae.py, to rounding, in less memory.

A 3x3 convolution needs one row above and below its strip, nothing more. What spans the whole picture is the statistics
of the norms, taken from all of it first, and the attention, which stands at the latents' resolution and is left whole.
So there is no seam, where tiles that are decoded apart and blended differ in colour. Two layers' outputs and a strip
are held at once, where a plain pass holds a third, the activated input, and what its convolutions need beside.

Shapes: B batch, C channels, H W positions of a layer.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.blocks import Upsample
from ldm.vae import AutoencoderKL, Downsample, Posterior, ResBlock

ROWS = 32  # of a layer's output at a time


def decode_in_strips(vae: AutoencoderKL, latents: Tensor, rows: int = ROWS) -> Tensor:
    """`AutoencoderKL.decode`: scaled latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w)."""
    decoder = vae.decoder
    x = decoder.middle(decoder.conv_in(vae.post_quant_conv(latents / vae.config.scale)))
    for level in reversed(decoder.levels):
        for step in level.steps():
            x = one_step(step, x, rows)
    return conv3x3(decoder.conv_out, x, activation(decoder.norm_out, x), rows)


def posterior_in_strips(vae: AutoencoderKL, images: Tensor, rows: int = ROWS) -> Posterior:
    """`AutoencoderKL.posterior`: images (B, 3, H, W) in [-1, 1] -> the distribution of their latents."""
    encoder = vae.encoder
    x = conv3x3(encoder.conv_in, images, lambda strip: strip, rows)
    for level in encoder.levels:
        for step in level.steps():
            x = one_step(step, x, rows)
    x = encoder.middle(x)
    moments = vae.quant_conv(encoder.conv_out(F.silu(encoder.norm_out(x))))
    mean, logvar = moments.chunk(2, dim=1)
    return Posterior(mean, logvar.clamp(-30.0, 20.0))


def one_step(step: nn.Module, x: Tensor, rows: int) -> Tensor:
    """One of `Level.steps`."""
    match step:
        case ResBlock():
            return res_block(step, x, rows)
        case Upsample():
            return upsample(step.conv, x, rows)
        case Downsample():
            return downsample(step.conv, x, rows)
    return x


def res_block(block: ResBlock, x: Tensor, rows: int) -> Tensor:
    y = conv3x3(block.conv1, x, activation(block.norm1, x), rows)
    y = conv3x3(block.conv2, y, activation(block.norm2, y), rows, in_place=True)
    for start, end in strips(x.shape[2], rows):
        y[:, :, start:end] += block.shortcut(x[:, :, start:end])
    return y


def activation(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """-> silu(norm(strip)), with the statistics of the whole x."""
    variances, means = [], []
    for group in rearrange(x, "b (groups c) h w -> groups b (c h w)", groups=norm.num_groups):
        variance, mean = torch.var_mean(group.float(), dim=1, correction=0)  # fp32: a half's square overflows
        variances.append(variance)
        means.append(mean)
    channels = x.shape[1] // norm.num_groups
    deviation = (torch.stack(variances, dim=1) + norm.eps).sqrt().repeat_interleave(channels, dim=1)  # (B, C)
    scale = norm.weight / deviation
    shift = norm.bias - torch.stack(means, dim=1).repeat_interleave(channels, dim=1) * scale
    return lambda strip: F.silu(strip * scale[..., None, None] + shift[..., None, None]).to(strip.dtype)


def conv3x3(
    conv: nn.Conv2d, x: Tensor, prepare: Callable[[Tensor], Tensor], rows: int, in_place: bool = False
) -> Tensor:
    """conv(prepare(x)) with padding 1, where `prepare` works on each position alone. `in_place` writes over x."""
    height = x.shape[2]
    out = x if in_place else x.new_empty(len(x), conv.out_channels, *x.shape[2:])
    above = x[:, :, :0]  # the row above the strip, from before it was written over
    for start, end in strips(height, rows):
        strip = prepare(torch.cat([above, x[:, :, start : end + 1]], dim=2))
        above = x[:, :, end - 1 : end].clone()
        strip = F.pad(strip, (1, 1, int(start == 0), int(end == height)))
        out[:, :, start:end] = F.conv2d(strip, conv.weight, conv.bias)
    return out


def upsample(conv: nn.Conv2d, x: Tensor, rows: int) -> Tensor:
    """Nearest neighbour, then the convolution: (B, C, H, W) -> (B, C, 2 H, 2 W)."""
    height, width = x.shape[2:]
    out = x.new_empty(len(x), conv.out_channels, 2 * height, 2 * width)
    for start, end in strips(height, rows // 2):
        strip = F.interpolate(x[:, :, max(start - 1, 0) : end + 1], scale_factor=2, mode="nearest")
        # One of the two rows that a row above or below has become is needed; at the border it is padding.
        strip = strip[:, :, int(start > 0) : strip.shape[2] - int(end < height)]
        strip = F.pad(strip, (1, 1, int(start == 0), int(end == height)))
        out[:, :, 2 * start : 2 * end] = F.conv2d(strip, conv.weight, conv.bias)
    return out


def downsample(conv: nn.Conv2d, x: Tensor, rows: int) -> Tensor:
    """Stride 2, padded right and bottom: (B, C, H, W) -> (B, C, H / 2, W / 2), odd sides rounded down."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    out = x.new_empty(len(x), conv.out_channels, height, width)
    for start, end in strips(height, rows):
        strip = x[:, :, 2 * start : 2 * end + 1]
        strip = F.pad(strip, (0, 1, 0, 2 * (end - start) + 1 - strip.shape[2]))
        out[:, :, start:end] = F.conv2d(strip, conv.weight, conv.bias, stride=2)
    return out


def strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    rows = max(1, rows)
    return ((start, min(start + rows, height)) for start in range(0, height, rows))
