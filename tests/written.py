"""Checkpoint files, written for the tests that load them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from reference import MINI_SD1, MINI_SD2, filled_checkpoint, load_manifest
from safetensors.torch import load_file, save_file
from small import SMALL
from torch import Tensor

from ldm import StableDiffusion
from ldm.checkpoints.load import without_weights
from ldm.checkpoints.open import open_checkpoint
from ldm.config import Config
from ldm.unet import UNet

MINIS = {"mini_sd1": MINI_SD1, "mini_sd2": MINI_SD2}
CONTEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def write_minis(folder: Path) -> Path:
    """The miniatures' files, base and control."""
    for name in MINIS:
        for part in ("checkpoint", "control_only"):
            filled_checkpoint(load_manifest(f"{name}_{part}"), folder / f"{name}_{part}.safetensors")
    return folder


def load_mini(folder: Path, name: str = "mini_sd1", **arguments) -> StableDiffusion:
    checkpoint = open_checkpoint(folder / f"{name}_checkpoint.safetensors")
    return StableDiffusion.from_checkpoint(checkpoint, MINIS[name], **arguments)


@cache
def empty_unet(config: Config) -> UNet:
    """Shapes alone, which tests do not change."""
    with without_weights():
        return UNet(config.unet)


def file_of(tmp_path: Path, shapes: dict, metadata: dict[str, str] | None = None, name: str = "file") -> Path:
    """A file with zeros of these shapes. Its dtype is small: only the header is read."""
    path = tmp_path / f"{name}.safetensors"
    save_file({key: torch.zeros(shape, dtype=torch.uint8) for key, shape in shapes.items()}, path, metadata)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None], target: Path | None = None):
    """The tensors of a safetensors file changed, its metadata kept."""
    checkpoint = open_checkpoint(path)
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    tensors = change(tensors) or tensors
    save_file(tensors, target or path, checkpoint.metadata)


def without_metadata(path: Path) -> None:
    """A safetensors file without our description, as other programs write it."""
    save_file({key: value.clone() for key, value in load_file(path).items()}, path)


def write_small_lora(path: Path, config: Config = SMALL) -> Path:
    """A random LoRA of rank 2 for small.small_sd, by kohya's names."""
    channels, middle, width = (
        config.unet.channels,
        config.unet.channels * config.unet.multipliers[-1],
        config.text.width,
    )
    shapes = {  # (O, I) or (O, I, h, w)
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v": (middle, middle),
        "lora_unet_down_blocks_0_resnets_0_conv1": (channels, channels, 3, 3),
        "lora_te_text_model_encoder_layers_0_mlp_fc2": (width, 4 * width),
    }
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, (o, i, *kernel) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, i, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(o, 2, *[1] * len(kernel), generator=generator)
    save_file(tensors, path)
    return path
