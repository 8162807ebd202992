"""The autoencoder whose latent space is diffused: images (B, 3, H, W) <-> latents (B, 4, H/8, W/8).

A variational autoencoder (Kingma and Welling, arXiv 1312.6114) with VQGAN's networks (Esser et al., arXiv 2012.09841):
Rombach et al., arXiv 2112.10752, as released with SD 1.x and 2.x. Images are RGB in [-1, 1]; every GroupNorm has
epsilon 1e-6. As in the released files, levels are numbered from fine to coarse in the encoder and the decoder alike, so
the decoder runs them in reverse.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .blocks import Upsample, norm_silu
from .config import VAEConfig


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(z | image) that the encoder predicts, not yet scaled for the UNet."""

    mean: Tensor  # (B, 4, h, w)
    logvar: Tensor  # (B, 4, h, w), in [-30, 20]

    @classmethod
    def of(cls, moments: Tensor) -> "Posterior":
        """From what the encoder gives, mean and log-variance concatenated: (B, 2 * 4, h, w)."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """The KL divergence from the standard normal distribution, summed over each sample: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class ResBlock(nn.Module):
    """Two pre-norm 3x3 convolutions with a residual connection: (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Nested, so that no variable keeps an activation alive longer than the next layer needs it.
        y = self.conv2(norm_silu(self.norm2, self.conv1(norm_silu(self.norm1, x))))
        y += self.shortcut(x)
        return y


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        # Contiguous, for the fused kernels: they need stride 1 in c, and without them all (h w)^2 logits are stored.
        q, k, v = (rearrange(f(y), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        return x + self.out(rearrange(self.attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.res1 = ResBlock(channels, channels, groups)
        self.attention = AttentionBlock(channels, groups)
        self.res2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.res2(self.attention(self.res1(x)))


class Downsample(nn.Module):
    """Halves the resolution. Pads on the right and at the bottom only, unlike the UNet's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The residual blocks of one resolution, then a change to the next. There is no `forward`: the caller iterates, so
    that no frame keeps the level's input alive."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, resample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        self.resample = resample


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, 2 * 4, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.widths, config.groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(widths[max(i - 1, 0)], c, config.blocks, groups, Downsample(c) if i < last else nn.Identity())
            for i, c in enumerate(widths)
        )
        self.middle = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            for block in level.blocks:
                x = block(x)
            x = level.resample(x)
        return self.conv_out(norm_silu(self.norm_out, self.middle(x)))


class Decoder(nn.Module):
    """Features (B, 4, h, w) -> images (B, 3, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, last = config.widths, config.groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], groups)
        self.levels = nn.ModuleList(
            Level(widths[min(i + 1, last)], c, config.blocks + 1, groups, Upsample(c) if i > 0 else nn.Identity())
            for i, c in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv_in(x))
        for level in reversed(self.levels):
            for block in level.blocks:
                x = block(x)
            x = level.resample(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class AutoencoderKL(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def posterior(self, images: Tensor) -> Posterior:
        """Images (B, 3, H, W) in [-1, 1] -> the distribution of their unscaled latents (B, 4, H/8, W/8)."""
        return Posterior.of(self.quant_conv(self.encoder(images)))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8): a sample given `noise`, else the mean."""
        posterior = self.posterior(images)
        return self.config.scale * (posterior.mean if noise is None else posterior.sample(noise))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w), nominally in [-1, 1] but not clipped."""
        return self.decoder(self.post_quant_conv(latents / self.config.scale))
