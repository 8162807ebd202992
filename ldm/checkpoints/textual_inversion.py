"""The files of embeddings (ldm/embeddings.py). Prompts name them by their file.

They hold the vectors under one of several keys: A1111's .pt under "string_to_param" {"*": vectors}, its .safetensors
as "emb_params", diffusers' files under the token that they were trained as {"<cat-toy>": vectors}.
"""

from pathlib import Path

import torch
from torch import Tensor

from .kinds import ONLY, kind, made_for
from .load import is_finite
from .open import open_checkpoint
from .stored import CheckpointError

MOST_VECTORS = 75  # all that a text encoder reads at once


def read_embedding(path: Path, width: int) -> Tensor:
    """The vectors (n, width), for a text encoder of this width, in fp32.

    Raises CheckpointError for a file that is not an embedding, that is one for another family, or that is damaged.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.keys & {"clip_l", "clip_g"}:
        raise CheckpointError(f'"{path}" is an embedding for SDXL or a later family, and {ONLY}: get one for your base')
    keys = [key for key in checkpoint.keys if key.startswith("string_to_param.")] or list(checkpoint.keys)
    vectors = checkpoint.tensors[keys[0]] if len(keys) == 1 else None
    if vectors is None or not vectors.dtype.is_floating_point or not 1 <= len(vectors.shape) <= 2:
        what = kind(checkpoint)
        found = "damaged, or for several words" if what.startswith("a textual inversion") else what
        raise CheckpointError(f'"{path}" is not an embedding for a word of a prompt: it is {found}')
    if vectors.shape[-1] != width:
        raise CheckpointError(
            f'"{path}" is an embedding for {made_for(vectors.shape[-1])}, expected {made_for(width)}: get one for your '
            "base"
        )
    if not 0 < vectors.numel <= MOST_VECTORS * width:
        raise CheckpointError(f'"{path}" has {vectors.numel // width} vectors, expected 1 to {MOST_VECTORS}')
    values = vectors.load(torch.float32).reshape(-1, width)
    if not is_finite(values):
        raise CheckpointError(f'"{path}" has NaN or infinite numbers: get another copy')
    return values
