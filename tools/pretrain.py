"""Trains the TINY base model from nothing on a procedural world.

    python -m tools.pretrain --out runs/base

First the autoencoder, then UNet and text encoder on its latents, at last the decoder alone on whole pictures, which
leaves the latents as they are. It can be stopped at any time: the same command goes on at the last save, and step k
always sees the same pictures and the same noise. The result is OUT/tiny.safetensors, there (with the decoder of the
first stage) as soon as the second is done.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python tools/pretrain.py`

from controlnet.data import LatentPairs, drop_prompts, seeded
from controlnet.images import to_images
from controlnet.measures import pooled_psnr, psnr
from controlnet.objective import base_loss
from controlnet.run_state import load_state, save_state
from controlnet.training import Optimisation, cosine_rate
from controlnet.worlds import Fill50k
from ldm.attention import SpatialTransformer
from ldm.blocks import ResBlock
from ldm.config import TINY, Config, VAEConfig
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

SAVE_EVERY = 500


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    vae = train_vae(TINY, args)
    sd = train_unet(TINY, vae, args)
    sd.save(args.out / "tiny.safetensors", torch.float16)
    sd.vae = train_decoder(sd.vae, args)
    sd.save(args.out / "tiny.safetensors", torch.float16)
    log(args.out, f"wrote {args.out / 'tiny.safetensors'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="the run's folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    vae = parser.add_argument_group("autoencoder")
    vae.add_argument("--vae-steps", type=int, default=5000)
    vae.add_argument("--vae-lr", type=float, default=1.5e-3)
    vae.add_argument("--decoder-steps", type=int, default=2000)
    vae.add_argument("--decoder-lr", type=float, default=5e-4)
    unet = parser.add_argument_group("UNet and text encoder")
    unet.add_argument("--pictures", type=int, default=8000, help="how many pictures they see, as cached latents")
    unet.add_argument("--unet-steps", type=int, default=3200)
    unet.add_argument("--unet-batch", type=int, default=32)
    unet.add_argument("--unet-lr", type=float, default=1.5e-3)
    return parser.parse_args()


def log(out: Path, line: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {line}"
    tqdm.write(line)
    with open(out / "log.txt", "a") as file:
        file.write(line + "\n")


# ---------------------------------------------------------------------------------------------------- autoencoder


def train_vae(config: Config, args: argparse.Namespace) -> AutoencoderKL:
    """On crops that grow to whole pictures; -> the moving average."""
    vae = fresh_vae(config.vae)
    return fit_vae("vae", vae, growing_crops, args.vae_steps, args.vae_lr, args)


def train_decoder(vae: AutoencoderKL, args: argparse.Namespace) -> AutoencoderKL:
    """The decoder alone, on whole pictures; -> the moving average."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return fit_vae("decoder", vae, whole_pictures, args.decoder_steps, args.decoder_lr, args)


def fit_vae(
    name: str,
    vae: AutoencoderKL,
    batch_of: Callable[[Fill50k, int, float, torch.Generator], Tensor],
    steps: int,
    lr: float,
    args: argparse.Namespace,
) -> AutoencoderKL:
    """Trains what requires gradients, with L1 + L2 + a small KL (for latents without gaps); -> the moving average."""
    world = Fill50k(TINY.resolution, args.seed)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_rate(100, steps))
    state = args.out / f"{name}.pt"
    parts = dict(vae=vae, average=average, optimizer=optimizer, rate=rate)
    start = load_state(state, **parts) if state.exists() else 0

    for step in tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10):
        generator = seeded(args.seed, 1, step)
        images = batch_of(world, step, step / steps, generator)
        posterior = vae.posterior(images)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decoder(vae.post_quant_conv(posterior.sample(noise)))
        loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 2e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(vae)

        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(state, step + 1, **parts)
            log(args.out, f"{name} step {step + 1} loss {loss.item():.4f} {vae_report(average.module, world)}")
    return average.module


def fresh_vae(config: VAEConfig) -> AutoencoderKL:
    """Weights that keep the deviation of what passes through (PyTorch's own initialisation shrinks it by 2.4 in each
    layer: colours were then hardly learned), and a posterior that starts narrow enough to carry a signal."""
    vae = AutoencoderKL(config).to(memory_format=torch.channels_last)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.constant_(vae.quant_conv.bias.data[config.latent_channels :], -6.0)
    return vae


def growing_crops(world: Fill50k, step: int, progress: float, generator: torch.Generator) -> Tensor:
    """(B, 3, side, side) in [-1, 1]: 32 crops of a quarter of the side, later 8 of half, at last 2 whole pictures.

    The cost of a step is the same for each; small crops show more colours, whole pictures are what is wanted.
    """
    parts, count = (4, 32) if progress < 0.4 else (2, 8) if progress < 0.75 else (1, 2)
    side = world.size // parts
    pictures = 8 if parts > 1 else 2
    images = to_images(world[step * 8 + i].image for i in range(pictures)).repeat_interleave(count // pictures, dim=0)
    corners = torch.randint(0, world.size - side + 1, (count, 2), generator=generator).tolist()
    crops = [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)]
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def whole_pictures(world: Fill50k, step: int, progress: float, generator: torch.Generator) -> Tensor:
    """(4, 3, 128, 128) in [-1, 1]."""
    images = to_images(world[step * 4 + i].image for i in range(4))
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def vae_report(vae: AutoencoderKL, world: Fill50k, count: int = 32) -> str:
    """Peak signal-to-noise ratio on held-out pictures, against 8x8 average pooling with bilinear upsampling."""
    held_out = Fill50k(world.size, held_out=True)
    images = to_images(held_out[i].image for i in range(count))
    latents = vae.posterior(images).mean
    decoded = vae.decoder(vae.post_quant_conv(latents)).clamp(-1, 1)
    return f"PSNR {psnr(decoded, images):.2f} dB (pooled {pooled_psnr(images):.2f}) deviation {latents.std():.2f}"


# ------------------------------------------------------------------------------------------- UNet and text encoder


def train_unet(config: Config, vae: AutoencoderKL, args: argparse.Namespace) -> StableDiffusion:
    """UNet and text encoder together, on cached latents, 10 % of the prompts dropped; -> their moving average."""
    world = Fill50k(config.resolution, args.seed)
    sd = StableDiffusion(replace(config, vae=replace(config.vae, scale=unit_scale(vae, world))))
    sd.vae.load_state_dict(vae.state_dict())
    sd.to(memory_format=torch.channels_last)
    start_branches_at_zero(sd.unet)
    # CLIP's own 0.02 is drowned by what the blocks add; at this size the words must be told apart from the start.
    nn.init.normal_(sd.text_encoder.token_embedding.weight, std=0.3)
    pairs = LatentPairs(world, args.pictures, sd)

    trained = nn.ModuleDict({"unet": sd.unet, "text_encoder": sd.text_encoder})
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimisation = Optimisation(
        trained.parameters(), args.unet_lr, cosine_rate(200, args.unet_steps), torch.device("cpu"), clip=1.0
    )
    state = args.out / "unet.pt"
    parts = dict(trained=trained, average=average, optimisation=optimisation)
    start = load_state(state, **parts) if state.exists() else 0

    bar = tqdm(range(start, args.unet_steps), initial=start, total=args.unet_steps, desc="unet", mininterval=10)
    mean_loss = 1.0
    for step in bar:
        generator = seeded(args.seed, 2, step)
        indices = pairs.draw(args.unet_batch, generator)
        latents = pairs.latents[indices]
        context = sd.encode_text(drop_prompts([pairs.captions[i] for i in indices], 0.1, generator))
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(sd.schedule.config.timesteps, (len(latents),), generator=generator)
        loss = base_loss(sd.unet, sd.schedule, latents, noise, t, context)
        optimisation.backward(loss)
        optimisation.step()
        average.update_parameters(trained)
        mean_loss = 0.99 * mean_loss + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)

        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.unet_steps:
            save_state(state, step + 1, **parts)
            log(args.out, f"unet step {step + 1} loss {mean_loss:.4f}")
    sd.unet, sd.text_encoder = average.module["unet"], average.module["text_encoder"]
    return sd


@torch.no_grad()
def unit_scale(vae: AutoencoderKL, world: Fill50k, count: int = 256) -> float:
    """What to multiply the latents with for unit deviation, as SD's 0.18215 was found."""
    images = to_images(world[i].image for i in range(count))
    return round(1 / vae.posterior(images).mean.std().item(), 5)


def start_branches_at_zero(unet: UNet) -> None:
    """Every residual branch, and the output, begins without weights, as those of DDPM and SD did."""
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.decoder.conv_out.weight)


if __name__ == "__main__":
    main()
