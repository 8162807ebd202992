"""The VAE in horizontal tiles: the same numbers as vae.py, up to rounding, in less memory.

A 3x3 convolution needs only one row above and below its tile. What spans the whole image are the statistics of the
norms, which are computed first, and the attention, which runs untiled at the latents' resolution. So there are no
seams, unlike where tiles are decoded independently and blended. Two layers' outputs and one tile are held at once;
vae.py holds a third map, the activated input, and the convolutions' workspace.

Shapes: B batch, C channels, H and W height and width of a layer's input.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.blocks import Upsample, norm_silu
from ldm.vae import AutoencoderKL, Downsample, Posterior, ResBlock

ROWS = 32  # of a layer's output, per tile


def decode_tiled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """`AutoencoderKL.decode`: scaled latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w)."""
    decoder = vae.decoder
    x = decoder.middle(decoder.conv_in(vae.post_quant_conv(latents / vae.config.scale)))
    for level in reversed(decoder.levels):
        for block in level.blocks:
            x = res_block(block, x)
        if isinstance(level.resample, Upsample):
            x = upsample(level.resample.conv, x)
    return conv3x3(decoder.conv_out, x, pointwise_norm_silu(decoder.norm_out, x))


def posterior_tiled(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """`AutoencoderKL.posterior`: images (B, 3, H, W) in [-1, 1] -> the distribution of their latents."""
    encoder = vae.encoder
    x = conv3x3(encoder.conv_in, images, lambda tile: tile)
    for level in encoder.levels:
        for block in level.blocks:
            x = res_block(block, x)
        if isinstance(level.resample, Downsample):
            x = downsample(level.resample.conv, x)
    x = encoder.middle(x)
    return Posterior.of(vae.quant_conv(encoder.conv_out(norm_silu(encoder.norm_out, x))))


def res_block(block: ResBlock, x: Tensor) -> Tensor:
    y = conv3x3(block.conv1, x, pointwise_norm_silu(block.norm1, x))
    y = conv3x3(block.conv2, y, pointwise_norm_silu(block.norm2, y), in_place=True)
    for start, end in tiles(x.shape[2]):
        y[:, :, start:end] += block.shortcut(x[:, :, start:end])
    return y


def pointwise_norm_silu(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """-> a function tile -> silu(norm(tile)) that uses the statistics of the whole x."""
    variances, means = [], []
    for group in rearrange(x, "b (groups c) h w -> groups b (c h w)", groups=norm.num_groups):
        variance, mean = torch.var_mean(group.float(), dim=1, correction=0)  # fp32: squares overflow fp16
        variances.append(variance)
        means.append(mean)
    channels = x.shape[1] // norm.num_groups
    std = (torch.stack(variances, dim=1) + norm.eps).sqrt().repeat_interleave(channels, dim=1)  # (B, C)
    scale = norm.weight / std
    shift = norm.bias - torch.stack(means, dim=1).repeat_interleave(channels, dim=1) * scale
    return lambda tile: F.silu(tile * scale[..., None, None] + shift[..., None, None]).to(tile.dtype)


def conv3x3(conv: nn.Conv2d, x: Tensor, prepare: Callable[[Tensor], Tensor], in_place: bool = False) -> Tensor:
    """conv(prepare(x)) with padding 1, for a pointwise `prepare`. `in_place` overwrites x."""
    height = x.shape[2]
    out = x if in_place else x.new_empty(len(x), conv.out_channels, *x.shape[2:])
    above = x[:, :, :0]  # the row above the tile, saved before it is overwritten
    for start, end in tiles(height):
        tile = prepare(torch.cat([above, x[:, :, start : end + 1]], dim=2))
        above = x[:, :, end - 1 : end].clone()
        tile = F.pad(tile, (1, 1, int(start == 0), int(end == height)))
        out[:, :, start:end] = F.conv2d(tile, conv.weight, conv.bias)
    return out


def upsample(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Nearest neighbour, then the convolution: (B, C, H, W) -> (B, C, 2 H, 2 W)."""
    height, width = x.shape[2:]
    out = x.new_empty(len(x), conv.out_channels, 2 * height, 2 * width)
    for start, end in tiles(height, scale=2):
        tile = F.interpolate(x[:, :, max(start - 1, 0) : end + 1], scale_factor=2, mode="nearest")
        # Of the two copies of the row above, and below, one is needed; beyond the image's border there is padding.
        tile = tile[:, :, int(start > 0) : tile.shape[2] - int(end < height)]
        tile = F.pad(tile, (1, 1, int(start == 0), int(end == height)))
        out[:, :, 2 * start : 2 * end] = F.conv2d(tile, conv.weight, conv.bias)
    return out


def downsample(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Stride 2, padded right and bottom: (B, C, H, W) -> (B, C, H / 2, W / 2), rounded down."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    out = x.new_empty(len(x), conv.out_channels, height, width)
    for start, end in tiles(height):
        tile = x[:, :, 2 * start : 2 * end + 1]
        tile = F.pad(tile, (0, 1, 0, 2 * (end - start) + 1 - tile.shape[2]))
        out[:, :, start:end] = F.conv2d(tile, conv.weight, conv.bias, stride=2)
    return out


def tiles(height: int, scale: int = 1) -> Iterator[tuple[int, int]]:
    """From where to where each tile goes in a layer's input, whose output is `scale` times as high."""
    rows = max(1, ROWS // scale)
    return ((start, min(start + rows, height)) for start in range(0, height, rows))
