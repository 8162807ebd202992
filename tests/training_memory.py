"""Runs of train.py's own `Training`, one after the other: how many bytes each was predicted to take, at least and
at most, and took at its peak, beyond what Python and PyTorch had before. Linux only.

    python tests/training_memory.py FOLDER "--batch-size 8" "--batch-size 4 --accumulate 2"

Its base has more weights than the tests' other models, so that the code which a first step loads counts for little.
"""

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from small import SMALL  # noqa: E402

from controlnet.training.distributed import Process  # noqa: E402
from controlnet.training.memory import Prediction  # noqa: E402
from controlnet.training.options import TrainSettings, parse_args  # noqa: E402
from controlnet.training.progress import Progress  # noqa: E402
from controlnet.training.resolve import control_config, resolve  # noqa: E402
from ldm import StableDiffusion  # noqa: E402
from train import Training  # noqa: E402

CPU, STEPS = torch.device("cpu"), 2
UNET = replace(SMALL.unet, channels=96, multipliers=(1, 2), attention=(False, True), heads=(2, 2))
CONFIG = replace(SMALL, unet=UNET)


def predicted(settings: TrainSettings) -> tuple[int, int]:
    size = (CONFIG.resolution, CONFIG.resolution)
    prediction = Prediction(CONFIG, settings, size, control_config(settings), CPU, validation=settings.validation)
    memory = prediction(settings.batch_size)
    before = memory.estimates["Python and PyTorch"].most
    return memory.least - before, memory.most - before


def measured(settings: TrainSettings) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    settings.out.mkdir()
    training = Training(settings, Process(0, 1, CPU))
    training.open_data(0)
    progress = Progress(training.run, settings, 0)
    with progress, training.writer:
        for step in range(STEPS):
            training.step()
            if step + 1 < STEPS:
                training.save(step + 1, progress)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def main(folder: Path, runs: list[str]) -> None:
    torch.set_num_threads(1)
    base, results = folder / "base.safetensors", []
    StableDiffusion(CONFIG).save(base)
    common = f"--base {base} --data fill50k --images 8 --validation 2 --sample-count 0 --device cpu".split()
    for i, options in enumerate(["--batch-size 1", *runs]):
        settings = resolve(parse_args("", [*common, "--out", str(folder / f"run {i}"), *options.split()]))
        took = measured(settings)
        if i > 0:  # the first run loads code
            results.append((*predicted(settings), took))
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
