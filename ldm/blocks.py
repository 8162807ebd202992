"""The convolutional parts of the UNet: time embedding (Ho et al., arXiv 2006.11239), residual block, downsampling,
upsampling (Dhariwal and Nichol, arXiv 2105.05233).

Shapes: B batch, C channels, h and w height and width, T width of the time embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """Timesteps (B,), integer or fractional -> (B, width) in fp32: cosines, then sines, at `width // 2` frequencies.

    The released models divide the exponent by half the width, where DDPM's own code divides by half - 1. For an odd
    width the last column is zero.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


class TimeEmbedding(nn.Module):
    """Timesteps (B,) -> (B, T): a sinusoidal embedding followed by a two-layer MLP. Raises TypeError for a number."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.linear1 = nn.Linear(channels, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        if not isinstance(t, Tensor) or t.ndim != 1:
            raise TypeError(f"t is {t!r:.80}, expected timesteps (B,), as in torch.tensor([500])")
        embedding = sinusoidal_embedding(t, self.channels).to(self.linear1.bias.dtype)
        return self.linear2(F.silu(self.linear1(embedding)))


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)), in place when no gradients are recorded."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """Two pre-norm 3x3 convolutions with a residual connection; the time embedding is added between them.

    (B, C_in, h, w), (B, T) -> (B, C_out, h, w)
    """

    def __init__(self, c_in: int, c_out: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(norm_silu(self.norm1, x))
        y += self.time(F.silu(time))[:, :, None, None]
        y = self.conv2(norm_silu(self.norm2, y))
        y += self.shortcut(x)
        return y


class Downsample(nn.Module):
    """Halves the resolution, rounding up: a convolution of stride 2, padded by one on every side."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
