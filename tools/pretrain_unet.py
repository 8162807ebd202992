"""The second part of pretraining: the UNet and the text encoder, on the autoencoder's latents."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from controlnet.common.images import save_png, to_images
from controlnet.inference.generate import generate
from controlnet.objective import denoising_loss, seeded
from controlnet.training.run_state import load_state, save_state
from ldm.attention import SpatialTransformer
from ldm.blocks import ResBlock
from ldm.checkpoints.files import new_file
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet
from ldm.vae import AutoencoderKL
from tools.pretrain_common import SAVE_EVERY, SHOWN, log, optimise
from tools.pretrain_pictures import Pictures, validation_worlds


def fresh_base(config: Config, vae: AutoencoderKL, pictures: Pictures) -> StableDiffusion:
    """An untrained UNet and text encoder on a trained autoencoder."""
    sd = StableDiffusion(replace(config, vae=replace(config.vae, scale=unit_scale(vae, pictures))))
    sd.vae.load_state_dict(vae.state_dict())
    start_branches_at_zero(sd.unet)
    # CLIP's 0.02 would drown in what the blocks add: at this size words must be distinguishable from the start.
    nn.init.normal_(sd.text_encoder.token_embedding.weight, std=0.3)
    return sd


@torch.no_grad()
def unit_scale(vae: AutoencoderKL, pictures: Pictures, count: int = 256) -> float:
    """The factor that gives latents unit standard deviation, as SD's 0.18215 was found."""
    images = to_images(pictures.images[:count]).to(vae.quant_conv.bias)
    return round(1 / vae.posterior(images).mean.std().item(), 5)


def start_branches_at_zero(unet: UNet) -> None:
    """The last layer of every residual branch and of the UNet starts with zero weights, as in DDPM and SD."""
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.decoder.conv_out.weight)


def train_unet(sd: StableDiffusion, pictures: Pictures, args: argparse.Namespace) -> StableDiffusion:
    """UNet and text encoder together, with 10 % of the prompts dropped. Returns their EMA."""
    sd.to(memory_format=torch.channels_last)
    trained = nn.ModuleDict({"unet": sd.unet, "text_encoder": sd.text_encoder}).requires_grad_(True)
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimisation = optimise(trained, args.unet_lr, args.unet_steps, args)
    state = args.out / "unet.pt"
    parts = dict(trained=trained, average=average, optimisation=optimisation)
    start = load_state(state, **parts) if state.exists() else 0

    pairs = LatentPairs.of(pictures, sd, args.out / "latents.npy")
    bar = tqdm(range(start, args.unet_steps), initial=start, total=args.unet_steps, desc="unet", mininterval=10)
    mean_loss = None
    for step in bar:
        generator = seeded(args.seed, 2, step)
        latents, captions = pairs.draw(args.unet_batch, generator)
        captions = drop_prompts(captions, 0.1, generator)
        latents, noise = latents.to(args.device), torch.randn(latents.shape, generator=generator).to(args.device)
        t = mostly_noisy(sd.schedule.config.timesteps, len(latents), generator).to(args.device)
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


@dataclass(frozen=True)
class LatentPairs:
    """Scaled latents (N, 4, h, w), fp32, and captions.

    The posterior's mean stands in for a sample: its standard deviation is a few thousandths of the latents' own.
    """

    latents: Tensor
    captions: list[str]

    @classmethod
    def of(cls, pictures: Pictures, sd: StableDiffusion, file: Path) -> "LatentPairs":
        """Read from `file`, or computed and kept there."""
        if not file.exists():
            chunks = tqdm(np.array_split(pictures.images, len(pictures.images) // 32 + 1), "latents", mininterval=10)
            with torch.no_grad():
                latents = torch.cat([sd.encode(to_images(chunk), sample=False).cpu() for chunk in chunks])
            with new_file(file) as temporary:
                np.save(temporary, latents.numpy())
        return cls(torch.from_numpy(np.load(file)), pictures.captions)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """At random, with replacement: step k of a run needs no memory of the steps before it."""
        indices = torch.randint(len(self.latents), (size,), generator=generator)
        return self.latents[indices], [self.captions[i] for i in indices.tolist()]


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
    worlds = validation_worlds(sd.config.resolution)
    rows = [
        np.hstack([np.asarray(generate(sd, world.draw(i).caption, seed=i, steps=10, cfg=2.5)[0]) for i in range(SHOWN)])
        for world in worlds
    ]
    save_png(Image.fromarray(np.vstack(rows)), path, {})
