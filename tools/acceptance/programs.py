"""The stages that run train.py and infer.py as their users do, mostly in this process, to save starts of PyTorch."""

import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from controlnet.training.run_state import RunFolder
from tools.bench_ours import PROMPT, ROOT

from .device import little_memory, with_peaks
from .exact import relative
from .job import Job
from .report import Report

FRACTION = 0.08  # of a GPU's memory: 7 GB of an H100, 12 of an H200, too little for what `out_of_memory` asks for
TRAININGS = {
    "fp32": ["--precision", "fp32"],
    "fp16, accumulated": ["--precision", "fp16", "--accumulate", "2"],
    "fp16, AdamW, checkpointing": ["--precision", "fp16", "--optimizer", "adamw", "--checkpointing"],
    "bf16": ["--precision", "bf16"],
    "4 workers": ["--workers", "4", "--no-cache"],
}
FEATURES = {
    "ddim": [],
    "ddpm": ["--sampler", "ddpm"],
    "dpm++": ["--sampler", "dpm++"],
    "fractional timesteps": ["--sampler", "dpm++-sde-karras"],
    "a control's mask and range": ["--control-mask", "MASK", "--control-start", "0.2", "--control-end", "0.8"],
    "reuse": ["--reuse", "2"],
    "inpainting": ["--init", str(ROOT / "assets" / "cat.jpg"), "--mask", "MASK", "--only-masked"],
}


class Done(NamedTuple):
    status: int
    text: str  # what it printed


def program(job: Job, name: str, *arguments: object) -> Done:
    """train.py or infer.py in this process."""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        try:
            status = import_module(name).main([*map(str, arguments), "--device", str(job.device)])
        except (Exception, SystemExit) as error:
            status = error.code if isinstance(error, SystemExit) else 1
            traceback.print_exc(file=text)
    job.settle()
    return Done(status, text.getvalue())


def ended(report: Report, what: str, done: Done, status: int = 0) -> None:
    report.must(f"{what}: exit status", done.status, most=status, least=status)
    if done.status != status:
        report.note(f"{what}: its last words", done.text[-600:])


@contextmanager
def folder(job: Job) -> Iterator[Path]:
    with TemporaryDirectory(dir=job.folder) as name:
        yield Path(name)


# ------------------------------------------------------------------------------------------------------------- training


def train(job: Job, out: Path, *arguments: object) -> Done:
    """A new run of the small model on a few images."""
    few = ["--images", 8, "--batch-size", 4, "--validation", 2, "--sample-count", 1, "--size", min(job.size.side, 128)]
    few += ["--steps", job.size.train_steps, "--lr-schedule", "constant", "--warmup", 1, *job.small_models[:2]]
    return program(job, "train", *few, "--out", out, *arguments)


def training(job: Job, report: Report) -> None:
    job.need_weights()
    with folder(job) as runs:
        for what, how in TRAININGS.items():
            ended(report, what, train(job, runs / what, *how))
        quiet = ["--sample-count", 0, "--cache", runs / "cache"]
        exact = [*quiet, "--deterministic"]
        report.must("--deterministic: a resumed run differs by", resumed(job, report, runs / "a", exact), most=0)
        report.must("--deterministic: one after a SIGTERM", stopped(job, report, runs / "b", exact), most=0)
        report.note("without it: a resumed run differs by", resumed(job, report, runs / "c", quiet))


def resumed(job: Job, report: Report, runs: Path, how: list) -> float:
    """-> how much a run in two parts differs from a whole one."""
    steps = job.size.train_steps
    ended(report, "a whole run", train(job, runs / "whole", *how))
    ended(report, "half a run", train(job, runs / "parts", *how, "--steps", steps // 2))
    ended(report, "its other half", program(job, "train", "--resume", "--steps", steps, "--out", runs / "parts"))
    return difference(runs / "parts", runs / "whole")


def stopped(job: Job, report: Report, runs: Path, how: list) -> float:
    """-> how much a run that a signal stopped, and that went on for a step, differs from a whole one."""
    log = runs / "stopped" / "log.jsonl"
    with signal_after(log):
        ended(report, "SIGTERM", train(job, runs / "stopped", *how, "--steps", 100_000), 128 + signal.SIGTERM)
    steps = len(log.read_text().splitlines()) + 1
    ended(report, "one step more", program(job, "train", "--resume", "--steps", steps, "--out", runs / "stopped"))
    ended(report, "a whole run", train(job, runs / "whole", *how, "--steps", steps))
    return difference(runs / "stopped", runs / "whole")


def difference(run: Path, other: Path) -> float:
    """The largest relative L2 difference of the tensors that two runs have trained."""
    found, wanted = (load_file(path / "control.safetensors") for path in (run, other))
    return max(relative(found[name], wanted[name]) for name in wanted)


@contextmanager
def signal_after(log: Path) -> Iterator[None]:
    """A SIGTERM to this process once there is a line in `log`. One that comes late does nothing."""
    before, over = signal.signal(signal.SIGTERM, lambda *_: None), False

    def watch() -> None:
        while not over and not (log.exists() and log.read_text().count("\n")):
            time.sleep(0.005)
        if not over:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over = True
        thread.join()
        signal.signal(signal.SIGTERM, before)


def fill50k(job: Job, report: Report) -> None:
    """The README's first training, in a process of its own, as its user starts it."""
    with folder(job) as runs:
        command = [sys.executable, "train.py", "--data", "fill50k", "--out", str(runs / "run")]
        command += ["--device", str(job.device)]
        start = time.monotonic()
        done = subprocess.run([*command, *job.size.whole_training], cwd=ROOT, capture_output=True, text=True)
        report.aim("train.py --data fill50k, seconds in all", time.monotonic() - start, most=60)
        ended(report, "train.py --data fill50k", Done(done.returncode, done.stdout + done.stderr))
        *_, last = RunFolder(runs / "run").logged()
        for name in ("validation_loss", "iou", "images_per_second", "memory_gb"):
            report.note(f"at its end: {name}", last.get(name, ""))


# ------------------------------------------------------------------------------------------------------------ inference


def infer(job: Job, report: Report) -> None:
    job.need_weights()
    with folder(job) as out:
        mask = Image.new("L", Image.open(ROOT / "assets" / "cat.jpg").size)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(out / "mask.png")
        for i, (what, how) in enumerate(FEATURES.items()):
            how = [out / "mask.png" if word == "MASK" else word for word in how]
            how += ["--steps", min(job.size.steps, 10), "--size", min(job.size.side, 128), "--prompt", PROMPT]
            first, second = out / f"{i}.png", out / f"{i}-again.png"
            made = program(job, "infer", *job.small_models, "--hint", "circle.png", *how, "--out", first)
            ended(report, what, made)
            ended(report, f"{what}: --again", program(job, "infer", "--again", first, "--trust", "--out", second))
            same = np.array_equal(*(np.asarray(Image.open(path)) for path in (first, second)))
            report.must(f"{what}: --again is equal", int(same), least=1)
        large_images(job, report, out)


def large_images(job: Job, report: Report, out: Path) -> None:
    settings = ["--hint", "circle.png", "--precision", job.size.precision, "--steps", 2, "--out", out / "large.png"]
    for side, how in [(job.size.side, []), *((side, ["--low-memory"]) for side in job.size.large)]:
        what = " ".join(["infer.py --size", str(side), *how])
        infer = partial(program, job, "infer", *job.models, *settings, "--size", side, *how)
        done, allocated, reserved = with_peaks(infer, job.device)
        ended(report, what, done)
        report.note(f"{what}: allocated, GB", allocated / 1e9)
        report.note(f"{what}: reserved, GB", reserved / 1e9)


def out_of_memory(job: Job, report: Report) -> None:
    """Both programs must end with a sentence, and a run of train.py must not lose what it had saved."""
    job.need_weights()
    with folder(job) as runs:
        ended(report, "a run before", train(job, runs / "run", "--sample-count", 0))
        again = ["--resume", "--out", runs / "run", "--steps", job.size.train_steps + 1]
        with little_memory(job.device, FRACTION):
            size = ["--size", max(job.size.large), "--steps", 1, "--precision", "fp32", "--out", runs / "large.png"]
            refused(report, "infer.py", program(job, "infer", *job.models, "--hint", "circle.png", *size))
            refused(report, "train.py", program(job, "train", *again, "--batch-size", 1024))
        ended(report, "resumed after it", program(job, "train", *again, "--batch-size", 4))
        report.must("half-written files", len([*runs.rglob("*.tmp"), *runs.glob("large.png")]), most=0)


def refused(report: Report, what: str, done: Done) -> None:
    ended(report, f"{what} out of memory", done, 2)
    report.must(f"{what} says so", int("out of memory:" in done.text), least=1)
