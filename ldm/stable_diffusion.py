"""Stable Diffusion under one roof: UNet, autoencoder, text encoder with its tokenizer, and the schedule.

Shapes: B batch, H W pixels, h = H/8, w = W/8, D context width.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.diffusers import save_pipeline
from ldm.checkpoints.key_maps import KeyMap, Layout, base_maps
from ldm.checkpoints.load import IGNORED_BESIDE_BASE, load_parts, without_weights
from ldm.checkpoints.lora import merge_loras, read_loras
from ldm.checkpoints.open import Checkpoint
from ldm.checkpoints.recognise import maps_in, open_base
from ldm.checkpoints.save import gather, save_checkpoint

from .config import Config
from .schedule import Schedule
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import AutoencoderKL


class StableDiffusion(nn.Module):
    """The base model. Built by the constructor its parts are random; `load` gives a trained one."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.vae = AutoencoderKL(config.vae)
        self.text_encoder = TextEncoder(config.text)
        self.loras: tuple[str, ...] = ()  # the names of those that were merged into the weights
        self.tokenizer = Tokenizer(config.text)
        # Its tables are not parameters: they stay on the CPU when the model is built elsewhere, as `load` does.
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
        zero_snr: bool = False,
        vae: str | Path | None = None,
        loras: Sequence[str] = (),
    ) -> "StableDiffusion":
        """A trained model from a file or folder in any published layout, or from `weights/` by its preset's name.

        It is locked: in eval mode and without gradients for its parameters (call `requires_grad_` to train them).
        `prediction` overrides what the file says that the UNet predicts: see recognise.py. `ema` takes the moving
        average of the UNet's weights, which the file must have. `zero_snr` adds zero terminal SNR, for bases that were
        trained with it and do not say so; `vae` is a file or folder with another autoencoder. `loras` are merged into
        the weights: files or names in weights/, each perhaps with a strength ("ink.safetensors:0.8"). A file of a base
        with its ControlNet serves as that base.
        Raises CheckpointError if there is no such file or it cannot be used, and for `loras` as `read_loras` does.
        """
        base = open_base(path_or_preset, prediction, zero_snr, vae)
        base.warn()
        checkpoint = base.checkpoint.with_ema() if ema else base.checkpoint
        model = cls.from_checkpoint(checkpoint, base.config, device, dtype)
        if loras:
            found = read_loras(loras, model.unet, model.text_encoder)
            merge_loras(found)
            model.loras = tuple(lora.path.stem for lora in found)
        return model

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
        load_parts(checkpoint, model.parts_in(checkpoint), IGNORED_BESIDE_BASE, dtype, device)
        return model.eval().requires_grad_(False)

    def save(self, path: str | Path, dtype: torch.dtype | None = None, layout: Layout = "ldm") -> None:
        """Write a file in the original layout, or a new folder in diffusers'. `dtype` None keeps the parameters' own.

        Diffusers' layout has no place for the last layer of SD 2.x's text encoder, which is never used.
        Raises ValueError for a folder that exists and is not empty.
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
        """The networks, each with its places in a file of this layout."""
        return list(zip((self.unet, self.vae, self.text_encoder), base_maps(self.config, layout), strict=True))

    def parts_in(self, checkpoint: Checkpoint) -> list[tuple[nn.Module, KeyMap]]:
        """The networks, each with its places in this checkpoint of a base."""
        return list(zip((self.unet, self.vae, self.text_encoder), maps_in(checkpoint, self.config), strict=True))

    def with_parts(self, **networks: nn.Module) -> "StableDiffusion":
        """The same with other networks under these names (unet, vae, text_encoder); everything else is shared."""
        other = copy.copy(self)
        other._modules = {**self._modules, **networks}
        return other

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def encode_text(self, prompts: list[str]) -> Tensor:
        """B prompts -> the context (B, 77, D) of the UNet's cross-attention."""
        ids = self.tokenizer(prompts)
        return self.text_encoder(ids.to(self.text_encoder.token_embedding.weight.device))

    def encode(self, images: Tensor, generator: torch.Generator | None = None, sample: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], on any device and of any type -> scaled latents (B, 4, h, w).

        A sample of the posterior, its noise drawn on the CPU from `generator`; without `sample` the mean.
        """
        like = self.vae.quant_conv.bias
        if not sample:
            return self.vae.encode(images.to(like))
        height, width = (side // self.config.vae.downscale for side in images.shape[-2:])
        noise = torch.randn(len(images), self.config.vae.latent_channels, height, width, generator=generator)
        return self.vae.encode(images.to(like), noise.to(like))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w), on any device and of any type -> images (B, 3, H, W), around [-1, 1] but not
        clipped to it."""
        return self.vae.decode(latents.to(self.vae.post_quant_conv.bias))
