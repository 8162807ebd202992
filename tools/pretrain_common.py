"""What both parts of pretraining use: optimizer, log, grids."""

import argparse
import time
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from controlnet.common.images import to_pil
from controlnet.training.optimisation import Optimisation, cosine_schedule

SAVE_EVERY = 500
SHOWN = 8  # validation images of each dataset in a grid


def log(out: Path, line: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {line}"
    tqdm.write(line)
    with open(out / "log.txt", "a") as file:
        file.write(line + "\n")


def optimise(module: nn.Module, lr: float, steps: int, args: argparse.Namespace) -> Optimisation:
    """Muon: its step takes a third longer than AdamW's, but it needs a fifth of the steps."""
    named, schedule = module.named_parameters(), cosine_schedule(100, steps)
    return Optimisation(named, lr, schedule, args.device, args.precision, clip=1.0, optimizer="muon")


def row_of(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> uint8 (H, B W, 3)."""
    return np.hstack([np.asarray(to_pil(image)) for image in images])
