"""All that tools.accept asks of CUDA alone, each with what takes its place on a CPU."""

import gc
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from controlnet.common.devices import use_precision
from tools.bench_case import name_of, reset_peak, resident, timed

from .report import Skip

WARM_UPS = 3


def settle(device: torch.device) -> None:
    """Sets PyTorch back to its own settings, but with fp32 in full, and frees memory."""
    use_precision("fp32", device)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median_seconds(work: Callable[[], Any], device: torch.device, runs: int) -> float:
    for _ in range(WARM_UPS):
        work()
    return statistics.median(timed(work, str(device))[0] for _ in range(runs))


# --------------------------------------------------------------------------------------------------------------- memory


def allocated(device: torch.device) -> float:
    """Bytes now: of PyTorch's tensors, or on a CPU of the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident("VmRSS")


def with_peaks(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """What `work` returns, and bytes while it runs: the most allocated, and the most that PyTorch reserved for it (on a
    CPU the same)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(str(device))
    result = work()
    if device.type != "cuda":
        return result, resident("VmHWM"), resident("VmHWM")
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


@contextmanager
def little_memory(device: torch.device, fraction: float) -> Iterator[None]:
    """Inside, PyTorch gets this part of the GPU's memory. Raises Skip for a CPU, which has no such limit."""
    if device.type != "cuda":
        raise Skip("only a GPU's memory can be limited")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


# -------------------------------------------------------------------------------------------------------- what happens


def profiled(work: Callable[[], Any], device: torch.device) -> list[tuple[str, int, float]]:
    """(operation or kernel, calls, microseconds of its own on the device), the longest first."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    own_time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [(event.key, event.count, getattr(event, own_time)) for event in profiler.key_averages()]
    return sorted(events, key=lambda event: -event[2])


def waits(work: Callable[[], Any], device: torch.device) -> list[str]:
    """For each time that the program waited for the GPU, the line of code; on a CPU none."""
    if device.type != "cuda":
        work()
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


def describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": name_of(device), "threads": torch.get_num_threads()}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": name_of(device),
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "memory, GB": total / 1e9,
        "memory that is free, GB": free / 1e9,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }
