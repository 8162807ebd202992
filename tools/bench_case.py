"""What one process of tools.bench does: it runs a task, and reports its time, memory, arithmetic and outputs.

A task is a function of a `Setup` and its row's arguments. It loads what it needs and returns its work, the function
that is timed. The work returns tensors to compare, by name, or a function that computes them and is not timed.
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
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from controlnet.common.devices import PRECISIONS, use_device, use_precision

LONG_ENOUGH, MOST_RUNS = 2, 5  # a process repeats its timed run until these seconds or runs are reached
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
    flops: float = math.nan  # of one run
    gemm_rate: float = math.nan  # FLOP/s of a large matrix product in the same process


def measure(module: str, task: str, arguments: dict, setup: dict, cold: bool, counting: bool) -> Measurement:
    """Warms up and times a task in this process; if `cold` it runs once, without warm-up.

    With `counting` it runs once more to count FLOPs, at the end because what counts them holds on to memory; not on
    CUDA, where much is replayed unseen.
    """
    setup = Setup(**setup)
    torch.set_num_threads(setup.threads)
    use_precision(setup.precision, use_device(setup.device))
    load = getattr(import_module(f"tools.{module}"), task)
    count_flops(one_of_each_kernel)  # also imports what counting needs
    before = resident("VmRSS")
    work = load(setup, **arguments)
    device = torch.device(setup.device).type
    reset_peak(setup.device)
    for _ in range(0 if cold else WARM_UPS[device]):
        work()
    if device != "cuda":  # where the first time counts: the memory of a graph that is replayed is taken for free
        reset_peak(setup.device)
    seconds, result = timed(work, setup.device)
    times = [seconds]
    while not cold and sum(times) < LONG_ENOUGH and len(times) < MOST_RUNS:
        times.append(timed(work, setup.device)[0])
    memory = peak_memory(setup.device, before)
    outputs = {name: to_numpy(value) for name, value in (result() if callable(result) else result).items()}
    measured = Measurement(times, memory, outputs)
    if counting and device == "cpu":
        measured = measured._replace(flops=count_flops(work), gemm_rate=gemm_rate(PRECISIONS[setup.precision]))
    return measured


def one_of_each_kernel() -> None:
    """Loads the code that every network needs: 0.1 GB that belong to PyTorch, not to a network."""
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


# ---------------------------------------------------------------------------------------------- memory and arithmetic


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


def count_flops(work: Callable) -> int:
    """Of matrix products, convolutions and attention, forward and backward."""
    aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
    kernels = {  # those of CPUs, which PyTorch does not count
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda y, q, k, v, *_, **__: (
            sdpa_backward_flop_count(y, q, k, v)
        ),
    }
    if torch.backends.mkldnn.is_available():  # the packed weights of ldm/fast/packed.py
        kernels |= dict.fromkeys(  # each output is a sum over all but the first axis of the weight
            (mkldnn._convolution_pointwise, mkldnn._linear_pointwise),
            lambda x, weight, *_, out_shape, **__: 2 * math.prod(out_shape) * math.prod(weight[1:]),
        )
        kernels[mkldnn._convolution_transpose_pointwise] = (  # a 4x4 kernel with stride 2: 2x2 weights for each output
            lambda x, weight, *_, out_shape, **__: 2 * math.prod(out_shape) * x[1] * 2 * 2
        )
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        work()
    return counter.get_total_flops()


def gemm_rate(dtype: torch.dtype, calls: int = 10) -> float:
    """FLOP/s of a large matrix product, the best of some calls: the most that the processor can do.

    It is also computed as a 1x1 convolution: another library, which uses wider vectors on some processors.
    """
    side = 2048
    matrix = torch.rand(side, side).to(dtype)
    x, weight = (
        y.contiguous(memory_format=torch.channels_last) for y in (matrix[None, ..., None], matrix[..., None, None])
    )
    ways = (lambda: matrix @ matrix, lambda: F.conv2d(x, weight))
    for way in ways:
        way()  # the first call chooses a kernel and makes its workspace
    return 2 * side**3 / min(timed(way, "cpu")[0] for way in ways for _ in range(calls))
