"""What both parts of pretraining use: the loop, with its optimizer, saves and log, and grids."""

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from controlnet.common.devices import sent
from controlnet.common.images import to_pil
from controlnet.training.distributed import Process
from controlnet.training.intervals import Interval
from controlnet.training.lr_schedules import cosine_schedule
from controlnet.training.optimisation import Optimisation
from controlnet.training.run_state import read_state, restore, state_of, write_state
from controlnet.training.step import Step

SAVE_EVERY = "10m"
SHOWN = 8  # validation images of each dataset in a grid


def log(out: Path, line: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {line}"
    tqdm.write(line)
    with open(out / "log.txt", "a") as file:
        file.write(line + "\n")


def train_part(
    name: str,
    trained: nn.Module,
    loss: nn.Module,
    inputs: Dataset,
    lr: float,
    report: Callable[[nn.Module, int], str],
    out: Path,
    device: torch.device,
    precision: str,
) -> nn.Module:
    """-> the EMA of `trained`, whose `loss` is minimised: one step with each of `inputs`, which are `loss`'s.

    With Muon: its step takes a third longer than AdamW's, but it needs a fifth of the steps. At every save `report`
    gets the EMA and the steps that are done, and what it returns is logged. All is kept in the folder `out`.
    """
    steps = len(inputs)
    average = copy.deepcopy(trained)
    averages, weights = list(average.parameters()), list(trained.parameters())
    named, schedule = trained.named_parameters(), cosine_schedule(100, steps)
    optimisation = Optimisation(named, lr, schedule, device, precision, clip=1.0, optimizer="muon")
    state, parts = out / f"{name}.pt", dict(trained=trained, average=average, optimisation=optimisation)
    start = restore(state, read_state(state), parts) if state.exists() else 0

    bar = tqdm(prepared(inputs, start, device), name, steps, initial=start, mininterval=10)
    step, saves, mean = Step(loss, optimisation, Process(0, 1, device)), Interval(SAVE_EVERY), None
    for done, drawn in enumerate(bar, start + 1):
        step_loss, _ = step(lambda drawn=drawn: tuple(sent(tensor, device) for tensor in drawn))
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 0.002)
        mean = step_loss.clone() if mean is None else mean.lerp_(step_loss, 0.01)
        if saves.due(done) or done == steps:
            write_state(state, state_of(done, parts))
            log(out, f"{name} step {done} loss {mean.item():.4f} {report(average, done)}")
    return average


def prepared(inputs: Dataset, start: int, device: torch.device) -> DataLoader:
    """From step `start` on. A CPU trains no faster with workers beside it."""
    workers = max((os.cpu_count() or 1) - 1, 1) if device.type == "cuda" else 0
    steps = range(start, len(inputs))
    return DataLoader(inputs, None, sampler=steps, num_workers=workers)


def row_of(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> uint8 (H, B W, 3)."""
    return np.hstack([np.asarray(to_pil(image)) for image in images])
