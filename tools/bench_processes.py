"""How tools.bench measures: each task has a process of its own, so that the memory is that task's and nobody else's.

A task is a function of a `Setup`. It builds what it needs and returns its work; calling the work does what is timed and
returns a function that gives the outputs to compare, by name. While one process works, the others wait for a command.
"""

import math
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from controlnet.common.devices import PRECISIONS

Outputs = Callable[[], dict[str, Tensor]]
Work = Callable[[], Outputs]


@dataclass(frozen=True)
class Case:
    """How much there is to do."""

    size: int  # of the pictures' sides, in pixels
    steps: int  # of sampling
    cfg: float
    batch_size: int  # of training
    checkpointing: bool = False  # gradients', as each program's own option does it
    trains_alone: bool = False  # where memory is short for both sides' processes: each measurement has a new one


@dataclass(frozen=True)
class Setup:
    """What a task needs to know. The folder holds the same models twice, as bench_ours.write_models leaves them."""

    case: Case
    folder: Path
    device: str
    precision: str  # fp32, fp16 or bf16
    threads: int


Task = Callable[[Setup], Work]


class Measurement(NamedTuple):
    seconds: float
    memory: float  # bytes, the peak; nan where it is not known
    outputs: dict[str, np.ndarray]


class Side(Protocol):
    """What can be measured again and again."""

    def measure(self) -> Measurement: ...


def in_turns(sides: Sequence[Side], rounds: int) -> list[tuple[Measurement, ...]]:
    """-> for each side its measurements. Each round has one of each, so what slows the machine slows all alike."""
    return list(zip(*([side.measure() for side in sides] for _ in range(rounds)), strict=True))


# ----------------------------------------------------------------------------------------------------------- processes


class Worker:
    """A task that is built once in a process of its own, and there measured at command."""

    def __init__(self, task: Task, setup: Setup):
        context = multiprocessing.get_context("spawn")  # a fork would have this process's memory
        self.name = f"{task.__module__}.{task.__name__}"
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, task, setup), daemon=True)
        self.process.start()
        other.close()

    def measure(self) -> Measurement:
        return self.ask("measure")

    def count(self) -> int:
        """Does the work once more -> its multiplications and additions. What counts them holds on to memory, so this
        comes after all measurements."""
        return self.ask("count")

    def ask(self, command: str):
        """Raises ValueError if the process is gone."""
        try:
            self.connection.send(command)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise ValueError(
                f"the process of {self.name} ended with status {self.process.exitcode}: what it said is above; if that "
                "is nothing, the system stopped it for want of memory: take a smaller --case, or leave it out of --only"
            ) from error

    def close(self) -> None:
        self.connection.close()  # its recv then fails, and it ends
        self.process.join()


class Anew:
    """A task that gets a new process for each measurement: cold, or warmed up there and counted."""

    def __init__(self, task: Task, setup: Setup, warm: bool = False):
        self.task, self.setup, self.warm = task, setup, warm
        self.operations = 0

    def measure(self) -> Measurement:
        worker = Worker(self.task, self.setup)
        try:
            if not self.warm:
                return worker.measure()
            worker.measure()
            measurement = worker.measure()
            self.operations = worker.count()
            return measurement
        finally:
            worker.close()

    def count(self) -> int:
        return self.operations


class Program:
    """A command line, from start to end."""

    def __init__(self, command: Sequence[str], threads: int):
        self.command, self.environment = command, {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def measure(self) -> Measurement:
        """Raises ValueError if it fails."""
        start = time.perf_counter()
        done = subprocess.run(self.command, env=self.environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise ValueError(f"`{' '.join(self.command)}` failed: {done.stderr.strip()}")
        return Measurement(seconds, math.nan, {})


def in_a_process(work: Callable, *arguments) -> None:
    """Calls it where its memory is given back at its end. Raises ValueError if it fails."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"{work.__name__} ended with status {process.exitcode}: what it said is above")


def serve(connection: Connection, task: Task, setup: Setup) -> None:
    """What a worker's process does until nobody asks any more."""
    torch.set_num_threads(setup.threads)
    counted(one_of_each_kernel)  # imports what counting needs; what the task needs is imported with it
    memory = Memory(setup.device)
    work = task(setup)
    commands = {"measure": lambda: measured(work, memory), "count": lambda: counted(work)}
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        connection.send(commands[command]())


def one_of_each_kernel() -> None:
    """Runs the code that every network needs, which from then on is in memory: 0.1 GB that are PyTorch's and not a
    network's."""
    with torch.enable_grad():
        x = torch.ones(1, 8, 8, 8, requires_grad=True)
        y = F.conv2d(F.silu(F.group_norm(x, 4)), torch.ones(8, 8, 3, 3, requires_grad=True), padding=1)
        y = F.linear(F.layer_norm(y.flatten(2), (64,)), torch.ones(64, 64, requires_grad=True))
        y = F.gelu(F.scaled_dot_product_attention(*(y.unflatten(1, (2, 4)),) * 3))
        y.sum().backward()


def measured(work: Work, memory: "Memory") -> Measurement:
    memory.reset()
    start = time.perf_counter()
    outputs = work()
    synchronise(memory.device)
    seconds = time.perf_counter() - start
    peak = memory.peak()
    return Measurement(seconds, peak, {name: as_numpy(value) for name, value in outputs().items()})


def as_numpy(value: Tensor) -> np.ndarray:
    return (value if value.dtype == torch.uint8 else value.detach().float()).cpu().numpy()


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------------- memory, arithmetic


class Memory:
    """The most that is held after `reset`: of the device, or on a CPU of this process above what it holds now."""

    def __init__(self, device: str):
        self.device = device
        self.before = resident("VmRSS")

    def reset(self) -> None:
        synchronise(self.device)
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.device)
        return resident("VmHWM") - self.before


def resident(field: str) -> float:
    """Bytes of this process in memory: VmRSS now, VmHWM at most; nan where there is no /proc, as outside Linux."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024 if status.exists() else math.nan


def counted(work: Work) -> int:
    """The floating-point operations of matrix products, convolutions and attention, forwards and backwards."""
    aten = torch.ops.aten
    attention = {  # from the shapes; PyTorch does not count these, which CPUs have
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda y, q, k, v, *_, **__: (
            sdpa_backward_flop_count(y, q, k, v)
        ),
    }
    packed = {}
    if torch.backends.mkldnn.is_available():  # see ldm/packed.py
        packed = dict.fromkeys(  # each output is a sum over all but the first side of the weight
            (torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._linear_pointwise),
            lambda x, weight, *_, out_shape, **__: 2 * math.prod(out_shape) * math.prod(weight[1:]),
        )
        packed[torch.ops.mkldnn._convolution_transpose_pointwise] = (  # of a kernel of 4 with stride 2: 2x2 for each
            lambda x, weight, *_, out_shape, **__: 2 * math.prod(out_shape) * x[1] * 2 * 2
        )
    with FlopCounterMode(display=False, custom_mapping=attention | packed) as counter:
        work()
    return counter.get_total_flops()


class MatrixProduct:
    """A large matrix product in this process: its operations per second are what the machine can do at most.

    On a CPU it is also done as a 1x1 convolution, and the faster way counts: that is another library, which on some
    processors uses wider vectors.
    """

    def __init__(self, setup: Setup, side: int = 4096):
        self.device = setup.device
        matrix = torch.rand(side, side, device=setup.device).to(PRECISIONS[setup.precision])
        self.operations = 2 * side**3
        self.ways = [lambda: matrix @ matrix]
        if setup.device == "cpu":
            x, weight = matrix[None, :, :, None], matrix[:, :, None, None]
            x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
            self.ways.append(lambda: F.conv2d(x, weight))
        self.measure()  # the warm-up

    def measure(self) -> Measurement:
        return Measurement(min(map(self.seconds, self.ways)), math.nan, {})

    def seconds(self, way: Callable[[], Tensor]) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        way()
        synchronise(self.device)
        return time.perf_counter() - start
