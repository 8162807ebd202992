"""An autoencoder in a file of its own, in place of a base's (--vae).

People have it as it was published (kl-f8, with the keys of its loss), as other programs save it (under the prefix that
it has in a base), in diffusers' layout with old or new names, and inside whole bases.
"""

from dataclasses import replace
from pathlib import Path

from ldm.config import VAEConfig
from ldm.vae import AutoencoderKL

from .key_maps import Layout, diffusers_vae_map, vae_map
from .kinds import kind
from .load import check_keys, without_weights
from .open import Checkpoint, open_checkpoint
from .published import find
from .stored import CheckpointError

PREFIXES = {"ldm": "first_stage_model.", "diffusers": "vae."}  # in a base


def open_vae(path: str | Path) -> Checkpoint:
    """Its tensors alone, under the prefix that its layout has in a base. `path` may be a name, as of a base.

    Raises CheckpointError as `open_checkpoint` does, and for a file without an autoencoder.
    """
    checkpoint = open_checkpoint(find(path)[0])
    prefix = next((p for p in (*PREFIXES.values(), "") if f"{p}decoder.conv_in.weight" in checkpoint.tensors), None)
    if prefix is None:
        raise CheckpointError(
            f'"{checkpoint.path}" holds no autoencoder: it is {kind(checkpoint)}; expected the file or folder of a VAE'
        )
    layout = "diffusers" if checkpoint.any_key(f"{prefix}decoder.mid_block.") else "ldm"
    own = {key.removeprefix(prefix): tensor for key, tensor in checkpoint.tensors.items() if key.startswith(prefix)}
    config = checkpoint.configs.get(prefix.rstrip("."), {})
    tensors = {PREFIXES[layout] + key: tensor for key, tensor in own.items()}
    return Checkpoint(checkpoint.path, tensors, configs={"vae": config} if config else {})


def vae_layout(checkpoint: Checkpoint) -> Layout:
    """Of the autoencoder in a base: not always the base's own layout, as another one may be in its place."""
    return "diffusers" if checkpoint.any_key(PREFIXES["diffusers"]) else "ldm"


def with_vae(base: Checkpoint, vae: Checkpoint) -> Checkpoint:
    """A base with the autoencoder of `open_vae`, in place of its own if it has one."""
    own = {key: tensor for key, tensor in base.tensors.items() if not key.startswith(tuple(PREFIXES.values()))}
    return replace(base, tensors=own | vae.tensors, configs=vae.configs | base.configs)


def check_vae(vae: Checkpoint, config: VAEConfig) -> None:
    """Raises CheckpointError for an autoencoder of `open_vae` that does not fit a base with this one."""
    scale = vae.configs.get("vae", {}).get("scaling_factor", config.scale)
    if scale != config.scale:
        raise CheckpointError(
            f'"{vae.path}" is an autoencoder for latents scaled by {scale!s:.40}, expected {config.scale} (0.13025 is '
            "that of SDXL): give one for your base"
        )
    key = f"{PREFIXES[vae_layout(vae)]}decoder.conv_in.weight"
    channels = vae.shape(key)[1:2]
    if channels != (config.latent_channels,):
        raise CheckpointError(
            f'"{vae.path}" is an autoencoder with {channels[0] if channels else "no"} latent channels, expected '
            f"{config.latent_channels} (those of SD 3 and Flux have 16): give one for your base"
        )
    make = vae_map if vae_layout(vae) == "ldm" else diffusers_vae_map
    with without_weights():
        module = AutoencoderKL(config)
    check_keys(vae, [(module, make(config))], ())
