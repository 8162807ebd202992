"""Trains the TINY base model from scratch on the synthetic datasets together: circles, people, shapes.

    python -m tools.pretrain --out runs/base

First the autoencoder is trained, then the UNet and the text encoder on its latents. The result is OUT/tiny.safetensors.
A run can be stopped at any time: the same command continues from the last save, and step k always sees the same images
and the same noise. With --start an existing base is trained further; its autoencoder stays, so its ControlNets still
fit.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from controlnet.common.images import save_png, to_images, to_pil
from controlnet.common.program import new_parser, run
from controlnet.inference.generate import generate
from controlnet.objective import denoising_loss, seeded
from controlnet.training.optimisation import Optimisation, cosine_schedule
from controlnet.training.run_state import load_state, save_state
from controlnet.worlds import Fill50k, Interleaved, People, Sample, Shapes
from controlnet.worlds.measures import pooled_psnr, psnr
from ldm.attention import SpatialTransformer
from ldm.blocks import ResBlock
from ldm.config import TINY, Config, VAEConfig
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet
from ldm.vae import AutoencoderKL
from tools.cli import add_debug

SAVE_EVERY = 500
MEASURED, SHOWN = 32, 8  # validation images of each dataset, at every save


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.pretrain", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="the run's folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--start", type=Path, help="a base to train further (default: from scratch)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 is twice as fast on CPUs with matrix units (AMX), and many times slower on others (default: fp32)",
    )
    vae = parser.add_argument_group("autoencoder")
    vae.add_argument("--vae-steps", type=int, default=3600, help="(default: %(default)s)")
    vae.add_argument("--vae-lr", type=float, default=2e-3, help="(default: %(default)s)")
    unet = parser.add_argument_group("UNet and text encoder")
    unet.add_argument(
        "--pictures", type=int, default=30000, help="images to train on, as cached latents (default: %(default)s)"
    )
    unet.add_argument("--unet-steps", type=int, default=3600, help="(default: %(default)s)")
    unet.add_argument("--unet-batch", type=int, default=64, help="(default: %(default)s)")
    unet.add_argument("--unet-lr", type=float, default=1.5e-3, help="(default: %(default)s)")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run("pretrain", lambda: pretrain(args), args.debug, stopped="the same command continues from the last save")


def pretrain(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    sd = StableDiffusion.load(args.start) if args.start else fresh_base(train_vae(TINY, args), args)
    sd = train_unet(sd, args)
    sd.save(args.out / "tiny.safetensors", torch.float16)
    log(args.out, f"wrote {args.out / 'tiny.safetensors'}")


def all_worlds(size: int, seed: int = 0, held_out: bool = False) -> Interleaved:
    return Interleaved([kind(size, seed, held_out=held_out) for kind in (Fill50k, People, Shapes)])


def log(out: Path, line: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {line}"
    tqdm.write(line)
    with open(out / "log.txt", "a") as file:
        file.write(line + "\n")


# ---------------------------------------------------------------------------------------------------- autoencoder


def train_vae(config: Config, args: argparse.Namespace) -> AutoencoderKL:
    """With L1 + L2 + a small KL term (for latents without gaps), on growing crops. Returns the EMA."""
    vae = fresh_vae(config.vae)
    world = all_worlds(TINY.resolution, args.seed)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimisation = optimise(vae, args.vae_lr, args.vae_steps, args.precision)
    state = args.out / "vae.pt"
    parts = dict(vae=vae, average=average, optimisation=optimisation)
    start = load_state(state, **parts) if state.exists() else 0

    for step in tqdm(range(start, args.vae_steps), "vae", args.vae_steps, initial=start, mininterval=10):
        generator = seeded(args.seed, 1, step)
        images = growing_crops(world, step, step / args.vae_steps, generator)
        with optimisation.autocast():
            posterior = vae.posterior(images)
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decoder(vae.post_quant_conv(posterior.sample(noise))).float()
        loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 2e-6 * posterior.kl().float().mean()
        optimisation.backward(loss)
        optimisation.step()
        average.update_parameters(vae)

        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.vae_steps:
            save_state(state, step + 1, **parts)
            report = vae_report(average.module, args.out / f"vae-{step + 1:06d}.png")
            log(args.out, f"vae step {step + 1} loss {loss.item():.4f} {report}")
    return average.module


def optimise(module: nn.Module, lr: float, steps: int, precision: str) -> Optimisation:
    """Muon: its step takes a third longer than AdamW's, but it needs a fifth of the steps."""
    schedule = cosine_schedule(100, steps)
    return Optimisation(
        module.named_parameters(), lr, schedule, torch.device("cpu"), precision, clip=1.0, optimizer="muon"
    )


def fresh_vae(config: VAEConfig) -> AutoencoderKL:
    """Initialised to keep the standard deviation of activations (PyTorch's default shrinks it by 2.4 in each layer, and
    colours are then hardly learned), with a posterior that starts narrow enough to carry a signal."""
    vae = AutoencoderKL(config).to(memory_format=torch.channels_last)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.constant_(vae.quant_conv.bias.data[config.latent_channels :], -6.0)
    return vae


def growing_crops(world: Interleaved, step: int, progress: float, generator: torch.Generator) -> Tensor:
    """(B, 3, side, side) in [-1, 1]: 64 crops of a quarter of the side, later 16 of half, at last 4 whole images.

    Each stage costs the same per step. Small crops show more edges; whole images are what counts in the end. Crops are
    centred on the object, where there is something to learn.
    """
    parts, count = (4, 64) if progress < 0.2 else (2, 16) if progress < 0.5 else (1, 4)
    side = world.size // parts
    drawn = min(count, 8)
    samples = [world[step * drawn + i] for i in range(drawn)] * (count // drawn)
    crops = [crop_at_object(sample, side, generator) for sample in samples]
    return to_images(crops).contiguous(memory_format=torch.channels_last)


def crop_at_object(sample: Sample, side: int, generator: torch.Generator) -> np.ndarray:
    """uint8 (side, side, 3) around a random pixel of the sample's mask, shifted to lie within the image."""
    pixels = np.argwhere(sample.mask)
    middle = pixels[torch.randint(len(pixels), (), generator=generator)]
    y, x = np.clip(middle - side // 2, 0, len(sample.mask) - side)
    return sample.image[y : y + side, x : x + side]


@torch.no_grad()
def vae_report(vae: AutoencoderKL, grid: Path) -> str:
    """PSNR on validation images of each dataset, beside that of 8x8 average pooling. Saves the first as a grid."""
    report = []
    rows = []
    for world in all_worlds(TINY.resolution, held_out=True).worlds:
        images = to_images(world[i].image for i in range(MEASURED))
        latents = vae.posterior(images).mean
        decoded = vae.decoder(vae.post_quant_conv(latents)).clamp(-1, 1)
        report.append(f"{world.name} {psnr(decoded, images):.2f} dB (pooled {pooled_psnr(images):.2f})")
        rows += [row_of(images[:SHOWN]), row_of(decoded[:SHOWN])]
    save_png(Image.fromarray(np.vstack(rows)), grid, {})
    return ", ".join([*report, f"standard deviation {latents.std():.2f}"])


def row_of(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> uint8 (H, B W, 3)."""
    return np.hstack([np.asarray(to_pil(image)) for image in images])


# ------------------------------------------------------------------------------------------- UNet and text encoder


def fresh_base(vae: AutoencoderKL, args: argparse.Namespace) -> StableDiffusion:
    """An untrained UNet and text encoder on a trained autoencoder."""
    scale = unit_scale(vae, all_worlds(TINY.resolution, args.seed))
    sd = StableDiffusion(replace(TINY, vae=replace(TINY.vae, scale=scale)))
    sd.vae.load_state_dict(vae.state_dict())
    start_branches_at_zero(sd.unet)
    # CLIP's 0.02 would drown in what the blocks add: at this size words must be distinguishable from the start.
    nn.init.normal_(sd.text_encoder.token_embedding.weight, std=0.3)
    return sd


@torch.no_grad()
def unit_scale(vae: AutoencoderKL, world: Interleaved, count: int = 256) -> float:
    """The factor that gives latents unit standard deviation, as SD's 0.18215 was found."""
    images = to_images(world[i].image for i in range(count))
    return round(1 / vae.posterior(images).mean.std().item(), 5)


def train_unet(sd: StableDiffusion, args: argparse.Namespace) -> StableDiffusion:
    """UNet and text encoder together, on cached latents, with 10 % of the prompts dropped. Returns their EMA."""
    sd.to(memory_format=torch.channels_last)
    trained = nn.ModuleDict({"unet": sd.unet, "text_encoder": sd.text_encoder}).requires_grad_(True)
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimisation = optimise(trained, args.unet_lr, args.unet_steps, args.precision)
    state = args.out / "unet.pt"
    parts = dict(trained=trained, average=average, optimisation=optimisation)
    start = load_state(state, **parts) if state.exists() else 0

    if start < args.unet_steps:
        pairs = LatentPairs(all_worlds(sd.config.resolution, args.seed), args.pictures, sd)
    bar = tqdm(range(start, args.unet_steps), initial=start, total=args.unet_steps, desc="unet", mininterval=10)
    mean_loss = None
    for step in bar:
        generator = seeded(args.seed, 2, step)
        indices = pairs.draw(args.unet_batch, generator)
        latents = pairs.latents[indices]
        captions = drop_prompts([pairs.captions[i] for i in indices], 0.1, generator)
        noise = torch.randn(latents.shape, generator=generator)
        t = mostly_noisy(sd.schedule.config.timesteps, len(latents), generator)
        with optimisation.autocast():
            output = sd.unet(sd.schedule.q_sample(latents, t, noise), t, sd.encode_text(captions))
            loss = denoising_loss(sd.schedule, output, latents, noise, t)
        optimisation.backward(loss)
        optimisation.step()
        average.update_parameters(trained)
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)

        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.unet_steps:
            save_state(state, step + 1, **parts)
            log(args.out, f"unet step {step + 1} loss {mean_loss:.4f}")
            save_samples(sd.with_parts(**average.module), args.out / f"unet-{step + 1:06d}.png")
    return sd.with_parts(**average.module)


class LatentPairs:
    """The first `length` samples of a dataset as latents (length, 4, h, w), computed once, here, and captions.

    The posterior's mean stands in for a sample: its standard deviation is a few thousandths of the latents' own.
    """

    def __init__(self, samples: Sequence[Sample], length: int, sd: StableDiffusion, chunk: int = 32):
        self.captions, latents = [], []
        for start in tqdm(range(0, length, chunk), desc="latents", mininterval=5):
            drawn = [samples[i] for i in range(start, min(start + chunk, length))]
            self.captions += [sample.caption for sample in drawn]
            with torch.no_grad():
                latents.append(sd.encode(to_images(sample.image for sample in drawn), sample=False).float().cpu())
        self.latents = torch.cat(latents)

    def draw(self, size: int, generator: torch.Generator) -> list[int]:
        """Random indices, with replacement: step k of a run needs no memory of the steps before it."""
        return torch.randint(len(self.latents), (size,), generator=generator).tolist()


def drop_prompts(captions: list[str], share: float, generator: torch.Generator) -> list[str]:
    """Each caption replaced by "" with probability `share`: classifier-free guidance needs a model that also works
    without a prompt."""
    dropped = torch.rand(len(captions), generator=generator) < share
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


def mostly_noisy(timesteps: int, count: int, generator: torch.Generator) -> Tensor:
    """(count,) timesteps, each with a probability proportional to t: flat images of 16x16 latents are decided while
    they are still mostly noise."""
    return torch.randint(timesteps, (2, count), generator=generator).amax(dim=0)


def save_samples(sd: StableDiffusion, path: Path) -> None:
    """A grid with a row of images for the first validation captions of each dataset, always with the same seeds."""
    worlds = all_worlds(sd.config.resolution, held_out=True).worlds
    rows = [
        np.hstack([np.asarray(generate(sd, world[i].caption, seed=i, steps=10)[0]) for i in range(SHOWN)])
        for world in worlds
    ]
    save_png(Image.fromarray(np.vstack(rows)), path, {})


def start_branches_at_zero(unet: UNet) -> None:
    """The last layer of every residual branch and of the UNet starts with zero weights, as in DDPM and SD."""
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.decoder.conv_out.weight)


if __name__ == "__main__":
    sys.exit(main())
