"""Checkpoints filled with numbers that follow from their keys, as the reference numbers in `fixtures/` were made."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.config import Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig

FIXTURES = Path(__file__).parent / "fixtures"

# The miniatures of the reference numbers: the real architecture at a tenth of its width.
MINI_SD1 = Config(
    "mini-sd1",
    unet=UNetConfig(channels=32, context_width=64),
    vae=VAEConfig(channels=32),
    text=TextConfig(width=64, heads=4, layers=3),
)
MINI_SD2 = Config(
    "mini-sd2",
    unet=UNetConfig(channels=32, heads=(4, 8, 16, 16), context_width=96, linear_projections=True, fp32_logits=True),
    vae=VAEConfig(channels=32),
    text=TextConfig("open_clip", width=96, heads=6, layers=3),
    schedule=ScheduleConfig("v"),
)


def fill(key: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's values from its key in the original layout: normal noise from a seed that is the key's hash."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    if len(shape) >= 2:
        embedding = any(name in key for name in ("token_embedding", "position_embedding", "positional_embedding"))
        return 0.02 * x if embedding else x / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * x if len(shape) == 1 and key.endswith("weight") else 0.1 * x


def load_manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape, of one of the checkpoints listed in fixtures/manifests/README.md."""
    if name.endswith("_full"):
        version = name.removeprefix("ldm_control_").removesuffix("_full")
        parts = (f"ldm_{version}_checkpoint", f"ldm_control_{version}_control_only")
        return {**load_manifest(parts[0]), **load_manifest(parts[1]), "logvar": (1000,)}
    return dict(flattened(json.loads((FIXTURES / "manifests" / f"{name}.json").read_text())))


def flattened(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, tuple(value)


def filled(manifest: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parameters by the rule of `fill`. Buffers are not parameters: position ids count, the schedule's are zero."""
    tensors = {}
    for key, shape in manifest.items():
        if key.endswith("position_ids"):
            tensors[key] = torch.arange(shape[1])[None].contiguous()
        else:
            tensors[key] = fill(key, shape) if "." in key else torch.zeros(shape)
    return tensors


def filled_checkpoint(manifest: dict[str, tuple[int, ...]], path: Path) -> Path:
    save_file(filled(manifest), path)
    return path
