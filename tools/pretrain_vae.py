"""The first part of pretraining: the autoencoder."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from controlnet.common.images import save_png, to_images
from controlnet.objective import seeded
from controlnet.worlds.measures import pooled_psnr, psnr
from ldm.config import Config, VAEConfig
from ldm.vae import AutoencoderKL
from tools.pretrain_common import SHOWN, row_of, train_part
from tools.pretrain_pictures import Pictures, validation_worlds

MEASURED = 32  # validation images of each dataset, at every save


def train_vae(config: Config, pictures: Pictures, args: argparse.Namespace) -> AutoencoderKL:
    """On growing crops. Returns the EMA."""
    vae = fresh_vae(config.vae).to(args.device)
    inputs = Crops(pictures.images, args.vae_batch, args.vae_steps, args.seed, config.vae)

    def report(average: AutoencoderKL, done: int) -> str:
        return vae_report(average, config.resolution, args.out / f"vae-{done:06d}.png")

    where = args.out, args.device, args.precision
    return train_part("vae", vae, VAELoss(vae), inputs, args.vae_lr, report, *where)


class VAELoss(nn.Module):
    """L1 + L2 + a small KL term, for latents without gaps."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.posterior(images)
        decoded = self.vae.decoder(self.vae.post_quant_conv(posterior.sample(noise))).float()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 2e-6 * posterior.kl().float().mean()


@dataclass(frozen=True)
class Crops(Dataset):
    """For each step the images, and noise for a sample of their posterior."""

    images: np.ndarray  # uint8 (N, H, W, 3)
    batch: int
    steps: int
    seed: int
    config: VAEConfig

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        generator = seeded(self.seed, 1, step)
        crops = growing_crops(self.images, self.batch, step / self.steps, generator)
        count, side = len(crops), crops.shape[-1] // self.config.downscale
        return crops, torch.randn(count, self.config.latent_channels, side, side, generator=generator)


def fresh_vae(config: VAEConfig) -> AutoencoderKL:
    """Initialised to keep the standard deviation of activations (PyTorch's default shrinks it by 2.4 in each layer, and
    colours are then hardly learned), with a posterior that starts narrow enough to carry a signal."""
    vae = AutoencoderKL(config).to(memory_format=torch.channels_last)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.constant_(vae.quant_conv.bias.data[config.latent_channels :], -6.0)
    return vae


def growing_crops(images: np.ndarray, batch: int, progress: float, generator: torch.Generator) -> Tensor:
    """(B, 3, side, side) in [-1, 1]: crops of a quarter of the side, later of half, at last `batch` whole images.

    Each stage costs the same per step. Small crops show more edges; whole images are what counts in the end.
    """
    parts = 4 if progress < 0.2 else 2 if progress < 0.5 else 1
    drawn = torch.randint(len(images), (batch * parts**2,), generator=generator).tolist()
    return to_images(crop_at_edge(np.array(images[i]), images.shape[1] // parts, generator) for i in drawn)


def crop_at_edge(image: np.ndarray, side: int, generator: torch.Generator) -> np.ndarray:
    """uint8 (side, side, 3) around a random pixel that differs from its neighbour, shifted to lie within the image:
    where nothing changes there is little to learn."""
    changes = np.argwhere(np.abs(np.diff(image.astype(np.int16), axis=1)).max(axis=2) > 16)  # (pixels, 2), rows first
    if len(changes) == 0 or side == len(image):
        return image[:side, :side]
    middle = changes[torch.randint(len(changes), (), generator=generator)]
    y, x = np.clip(middle - side // 2, 0, len(image) - side)
    return image[y : y + side, x : x + side]


@torch.no_grad()
def vae_report(vae: AutoencoderKL, size: int, grid: Path) -> str:
    """PSNR on validation images of each dataset, beside that of 8x8 average pooling. Saves the first as a grid."""
    report = []
    rows = []
    for world in validation_worlds(size):
        images = to_images(world.draw(i).image for i in range(MEASURED))
        latents = vae.posterior(images.to(vae.quant_conv.bias)).mean
        decoded = vae.decoder(vae.post_quant_conv(latents)).clamp(-1, 1).cpu()
        report.append(f"{world.name} {psnr(decoded, images):.2f} dB (pooled {pooled_psnr(images):.2f})")
        rows += [row_of(images[:SHOWN]), row_of(decoded[:SHOWN])]
    save_png(Image.fromarray(np.vstack(rows)), grid, {})
    return ", ".join([*report, f"standard deviation {latents.std():.2f}"])
