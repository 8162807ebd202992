"""The second part of pretraining: the UNet and the text encoder, on the autoencoder's latents."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from controlnet.common.images import save_png, to_images
from controlnet.inference.generate import generate
from controlnet.objective import denoising_loss, seeded
from ldm.attention import SpatialTransformer
from ldm.blocks import ResBlock
from ldm.checkpoints.files import new_file
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet
from ldm.vae import AutoencoderKL
from tools.pretrain_common import SHOWN, train_part
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
def unit_scale(vae: AutoencoderKL, pictures: Pictures) -> float:
    """The factor that gives latents unit standard deviation, as SD's 0.18215 was found."""
    images = to_images(np.array(pictures.images[:256])).to(vae.quant_conv.bias)
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
    """UNet and text encoder together. Returns their EMA."""
    sd.to(memory_format=torch.channels_last)
    sd.schedule = sd.schedule.to(args.device)
    trained = nn.ModuleDict({"unet": sd.unet, "text_encoder": sd.text_encoder}).requires_grad_(True)
    latents = latents_of(pictures, sd, args.out / "latents.npy")
    batches = Batches(latents, pictures.captions, sd, args.unet_batch, args.unet_steps, args.seed)

    def report(average: nn.ModuleDict, done: int) -> str:
        save_samples(sd.with_parts(**average), args.out / f"unet-{done:06d}.png")
        return ""

    where = args.out, args.device, args.precision
    return sd.with_parts(**train_part("unet", trained, BaseLoss(sd), batches, args.unet_lr, report, *where))


class BaseLoss(nn.Module):
    """The denoising loss, whose gradients go to the UNet and to the text encoder."""

    def __init__(self, sd: StableDiffusion):
        super().__init__()
        self.unet, self.text_encoder, self.schedule = sd.unet, sd.text_encoder, sd.schedule

    def forward(self, latents: Tensor, noise: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        output = self.unet(self.schedule.q_sample(latents, t, noise), t, self.text_encoder(ids))
        return denoising_loss(self.schedule, output, latents, noise, t)


def latents_of(pictures: Pictures, sd: StableDiffusion, file: Path) -> Tensor:
    """(N, 4, h, w), scaled, fp32: read from `file`, or computed and kept there.

    The posterior's mean stands in for a sample: its standard deviation is a few hundredths of the latents' own.
    """
    if not file.exists():
        chunks = tqdm(np.array_split(pictures.images, len(pictures.images) // 64 + 1), "latents", mininterval=10)
        with torch.no_grad():
            latents = torch.cat([sd.encode(to_images(np.array(chunk)), sample=False).cpu() for chunk in chunks])
        with new_file(file) as temporary:
            np.save(temporary, latents.numpy())
    return torch.from_numpy(np.load(file))


class Batches(Dataset):
    """For each step latents, noise, timesteps and the captions' ids. They are drawn with replacement, by a generator of
    the step's own: a run that goes on needs no memory of the steps before."""

    def __init__(self, latents: Tensor, captions: list[str], sd: StableDiffusion, batch: int, steps: int, seed: int):
        self.latents, self.batch, self.steps, self.seed = latents, batch, steps, seed
        self.ids, self.no_prompt = sd.tokenizer(captions), sd.tokenizer([""])
        self.timesteps = sd.schedule.config.timesteps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = seeded(self.seed, 2, step)
        drawn = torch.randint(len(self.latents), (self.batch,), generator=generator)
        latents, ids = self.latents[drawn], self.ids[drawn]
        # Classifier-free guidance needs a model that also works without a prompt.
        dropped = torch.rand(self.batch, generator=generator) < 0.1
        ids = torch.where(dropped[:, None], self.no_prompt, ids)
        noise = torch.randn(latents.shape, generator=generator)
        return latents, noise, mostly_noisy(self.timesteps, self.batch, generator), ids


def mostly_noisy(timesteps: int, count: int, generator: torch.Generator) -> Tensor:
    """(count,) timesteps, each the larger of two, so with a probability nearly proportional to t: flat images of 16x16
    latents are decided while they are still mostly noise."""
    return torch.randint(timesteps, (2, count), generator=generator).amax(dim=0)


def save_samples(sd: StableDiffusion, path: Path) -> None:
    """A grid with a row of images for the first validation captions of each dataset, always with the same seeds."""
    worlds = validation_worlds(sd.config.resolution)
    rows = [
        np.hstack([np.asarray(generate(sd, world.draw(i).caption, seed=i, steps=10, cfg=2.5)[0]) for i in range(SHOWN)])
        for world in worlds
    ]
    save_png(Image.fromarray(np.vstack(rows)), path, {})
