"""Runs of train.py's own `Training`, one after the other: how many bytes each was predicted to take, at least and
at most, and took at its peak, beyond what Python and PyTorch had before. Linux only.

    PYTHONPATH=. python tests/training_memory.py FOLDER "--batch-size 8" "--batch-size 4 --accumulate 2"

Its base has more weights than the tests' other models, so that the code which a first step loads counts for little.
"""

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from small import SMALL

from controlnet.training.distributed import Process
from controlnet.training.memory import Prediction
from controlnet.training.options import TrainSettings, parse_args
from controlnet.training.progress import Progress
from controlnet.training.resolve import control_config, resolve
from ldm import StableDiffusion
from train import Training

CPU, STEPS = torch.device("cpu"), 2
UNET = replace(SMALL.unet, channels=144, multipliers=(1,), attention=(True,), heads=(2,))
CONFIG = replace(SMALL, unet=UNET)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h


def predicted(settings: TrainSettings) -> tuple[int, int]:
    size = (CONFIG.resolution, CONFIG.resolution)
    prediction = Prediction(CONFIG, settings, size, control_config(settings), CPU, validation=settings.validation)
    memory = prediction(settings.batch_size)
    before, _ = memory.estimates["Python and PyTorch"]
    return memory.least - before, memory.most - before


def measured(settings: TrainSettings) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    settings.out.mkdir()
    training = Training(settings, Process(0, 1, CPU))
    training.open_data(0)
    training.open_loop()
    progress = Progress(training.run, settings, 0)
    with progress, training.writer:
        for step in range(STEPS):
            training.step()
            if step + 1 < STEPS:
                training.save(step + 1, progress)
    return resident("VmHWM") - before


def give_back_what_is_freed() -> None:
    """glibc keeps freed memory for later, more or less of it as threads happen to meet: of a process of 200 MB a tenth.
    With one heap, and none for what is larger than 64 KiB, tensors go back to the system when they are freed."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_ARENA_MAX, 1) and libc.mallopt(M_MMAP_THRESHOLD, 65536)


def resident(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def compare(folder: Path, runs: list[str]) -> list[tuple[int, int, int]]:
    give_back_what_is_freed()
    torch.set_num_threads(1)
    base, results = folder / "base.safetensors", []
    StableDiffusion(CONFIG).save(base)
    common = f"--base {base} --data fill50k --images 8 --validation 2 --sample-count 0 --device cpu".split()
    for i, options in enumerate(["--batch-size 1", *runs]):
        settings = resolve(parse_args("", [*common, "--out", str(folder / f"run {i}"), *options.split()]))
        took = measured(settings)
        if i > 0:  # the first run loads code
            results.append((*predicted(settings), took))
    return results


def write_comparison(folder: Path, runs: list[str]) -> None:
    """In a process of its own."""
    (folder / "comparison.json").write_text(json.dumps(compare(folder, runs)))


if __name__ == "__main__":
    print(compare(Path(sys.argv[1]), sys.argv[2:]))
