"""What one process of tools.bench does: it runs a task, and reports its time, memory and outputs.

A task is a function of a `Setup` and its row's arguments that loads what it needs and returns its work: the function
that is timed. The work returns tensors to compare, by name, or an untimed function that computes them.
"""

import math
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from controlnet.common.devices import use_device, use_precision

LONG_ENOUGH, MOST_RUNS = 2, 5  # seconds and runs, at which a process stops to repeat its work
WARM_UPS = {"cpu": 1, "cuda": 3}  # a GPU's clock, libraries and memory take a few runs to settle

Outputs = dict[str, Tensor]
Work = Callable[[], Outputs | Callable[[], Outputs]]


@dataclass(frozen=True)
class Setup:
    """What a task needs to know. `folder` holds the same models twice, as bench_ours.write_models saves them."""

    size: int  # of the images' sides, in pixels
    steps: int  # of sampling
    cfg: float
    batch_size: int  # of training
    checkpointing: bool  # gradient checkpointing in training
    folder: Path
    device: str
    precision: str
    threads: int


class Measurement(NamedTuple):
    seconds: list[float]  # of each timed run
    memory: float  # their peak in bytes, nan where it is unknown
    outputs: dict[str, np.ndarray]  # of the first timed run


def measure(module: str, task: str, arguments: dict, setup: dict, cold: bool) -> Measurement:
    """Warms up and times a task in this process; if `cold` it runs once, without warm-up."""
    setup = Setup(**setup)
    torch.set_num_threads(setup.threads)
    use_precision(setup.precision, use_device(setup.device))
    load = getattr(import_module(f"tools.{module}"), task)
    one_of_each_kernel()
    before = resident("VmRSS")
    work = load(setup, **arguments)
    device = torch.device(setup.device).type
    reset_peak(setup.device)
    for _ in range(0 if cold else WARM_UPS[device]):
        work()
    if device != "cuda":  # there the warm-up counts: a replayed graph's memory does not show as allocated
        reset_peak(setup.device)
    seconds, result = timed(work, setup.device)
    times = [seconds]
    while not cold and sum(times) < LONG_ENOUGH and len(times) < MOST_RUNS:
        times.append(timed(work, setup.device)[0])
    memory = peak_memory(setup.device, before)
    outputs = {name: to_numpy(value) for name, value in (result() if callable(result) else result).items()}
    return Measurement(times, memory, outputs)


def one_of_each_kernel() -> None:
    """Loads the code that every network needs: its 0.1 GB belong to PyTorch, not to a network."""
    x = torch.ones(1, 8, 8, 8, requires_grad=True)
    y = F.conv2d(F.silu(F.group_norm(x, 4)), torch.ones(8, 8, 3, 3, requires_grad=True), padding=1)
    y = F.linear(F.layer_norm(y.flatten(2), (64,)), torch.ones(64, 64, requires_grad=True))
    F.gelu(F.scaled_dot_product_attention(*(y.unflatten(1, (2, 4)),) * 3)).sum().backward()


def timed(work: Callable, device: str) -> tuple[float, Any]:
    synchronize = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result


def to_numpy(value: Tensor) -> np.ndarray:
    return (value if value.dtype == torch.uint8 else value.detach().float()).cpu().numpy()


# --------------------------------------------------------------------------------------------------------------- memory


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str, before: float) -> float:
    """Bytes: the most allocated on a CUDA device; else the most this process held, beyond `before`."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident("VmHWM") - before


def name_of(device: torch.device) -> str:
    """What the GPU or the processor calls itself."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    told = Path("/proc/cpuinfo")  # of Linux
    name = re.search(r"^model name\s*: (.+)", told.read_text(), re.MULTILINE) if told.exists() else None
    return name[1] if name else platform.processor() or "CPU"


def resident(field: str) -> float:
    """Bytes of this process in memory: VmRSS now, VmHWM at most; nan where there is no /proc, as outside Linux."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024 if status.exists() else math.nan
