"""The first part of pretraining: the autoencoder."""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from controlnet.common.images import save_png, to_images
from controlnet.objective import seeded
from controlnet.training.run_state import load_state, save_state
from controlnet.worlds.measures import pooled_psnr, psnr
from ldm.config import Config, VAEConfig
from ldm.vae import AutoencoderKL
from tools.pretrain_common import SAVE_EVERY, SHOWN, log, optimise, row_of
from tools.pretrain_pictures import Pictures, validation_worlds

MEASURED = 32  # validation images of each dataset, at every save


def train_vae(config: Config, pictures: Pictures, args: argparse.Namespace) -> AutoencoderKL:
    """With L1 + L2 + a small KL term (for latents without gaps), on growing crops. Returns the EMA."""
    vae = fresh_vae(config.vae).to(args.device)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimisation = optimise(vae, args.vae_lr, args.vae_steps, args)
    state = args.out / "vae.pt"
    parts = dict(vae=vae, average=average, optimisation=optimisation)
    start = load_state(state, **parts) if state.exists() else 0

    for step in tqdm(range(start, args.vae_steps), "vae", args.vae_steps, initial=start, mininterval=10):
        generator = seeded(args.seed, 1, step)
        images = growing_crops(pictures.images, step / args.vae_steps, generator).to(args.device)
        with optimisation.autocast():
            posterior = vae.posterior(images)
            noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
            decoded = vae.decoder(vae.post_quant_conv(posterior.sample(noise))).float()
        loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 2e-6 * posterior.kl().float().mean()
        optimisation.backward(loss)
        optimisation.step()
        average.update_parameters(vae)

        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.vae_steps:
            save_state(state, step + 1, **parts)
            report = vae_report(average.module, config.resolution, args.out / f"vae-{step + 1:06d}.png")
            log(args.out, f"vae step {step + 1} loss {loss.item():.4f} {report}")
    return average.module


def fresh_vae(config: VAEConfig) -> AutoencoderKL:
    """Initialised to keep the standard deviation of activations (PyTorch's default shrinks it by 2.4 in each layer, and
    colours are then hardly learned), with a posterior that starts narrow enough to carry a signal."""
    vae = AutoencoderKL(config).to(memory_format=torch.channels_last)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.constant_(vae.quant_conv.bias.data[config.latent_channels :], -6.0)
    return vae


def growing_crops(images: np.ndarray, progress: float, generator: torch.Generator) -> Tensor:
    """(B, 3, side, side) in [-1, 1]: 64 crops of a quarter of the side, later 16 of half, at last 4 whole images.

    Each stage costs the same per step. Small crops show more edges; whole images are what counts in the end.
    """
    parts, count = (4, 64) if progress < 0.2 else (2, 16) if progress < 0.5 else (1, 4)
    drawn = torch.randint(len(images), (count,), generator=generator).tolist()
    crops = [crop_at_edge(images[i], images.shape[1] // parts, generator) for i in drawn]
    return to_images(crops).contiguous(memory_format=torch.channels_last)


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
