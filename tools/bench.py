"""Measures speed and memory beside diffusers, with the same weights, sizes, precision and number of threads.

    python -m tools.bench                        # the small models of weights/: half an hour on two cores
    python -m tools.bench --case sd15-256        # SD 1.5 at full size with random weights
    python -m tools.bench --case sd15-512 --device cuda --precision fp16
    python -m tools.bench --only sampling vae --rounds 9

Prints a table to paste. In each round both sides take turns, each in a new process, as its users run it: ours on a CPU
with packed weights and kept memory, as infer.py and train.py do. Training at 512x512 uses gradient checkpointing on
both sides, and needs 16 GB. Times are medians after a warm-up. Memory is the peak beyond Python and its packages,
weights included; on CUDA what is allocated there. Outputs are compared in every round, except with --reuse, which is
approximate: if they differ by more than rounding (in fp32 1e-4 of their norm) the exit status is 1.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from controlnet.common.program import PRECISION_HELP, PRECISION_NAMES, new_parser, note, positive
from tools.cli import add_device, run_tool

CASES = {
    "tiny": {"size": 128, "steps": 20, "cfg": 2.5, "batch_size": 8, "checkpointing": False},
    "sd15-256": {"size": 256, "steps": 4, "cfg": 7.5, "batch_size": 1, "checkpointing": False},
    "sd15-512": {"size": 512, "steps": 4, "cfg": 7.5, "batch_size": 4, "checkpointing": True},
}
STEPS_ON_A_GPU = 20  # a few would measure what is done once: reading the prompt, decoding, starting


@dataclass(frozen=True)
class Row:
    """One row of the table: a task of bench_ours.py, beside that of bench_peers.py or another of our own."""

    task: str  # also the section's name
    what: str  # formatted with the setup
    arguments: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] | None = None  # the arguments of our own task that it is compared with, if it is
    cold: bool = False  # measured once in each process, without a warm-up


ROWS = (
    Row("sampling", "an image of {size}x{size}, {steps} steps"),
    Row("reuse", "4 images by each small ControlNet with --reuse 2; beside it in full", {"every": 2}, own={"every": 1}),
    Row("vae", "VAE, encoding {size}x{size}", {"encode": True, "tiled": False}),
    Row("vae", "VAE, encoding {size}x{size}, tiled (--low-memory)", {"encode": True, "tiled": True}),
    Row("vae", "VAE, decoding {size}x{size}", {"encode": False, "tiled": False}),
    Row("vae", "VAE, decoding {size}x{size}, tiled (--low-memory)", {"encode": False, "tiled": True}),
    Row("training", "a training step, batch {batch_size} of {size}x{size}, encoded before", {"cached": True}),
    Row("training", "a training step, batch {batch_size} of {size}x{size}, encoded in it", {"cached": False}),
    Row("loading", "loading base and ControlNet", cold=True),
    Row("start", "infer.py, one step; beside it `import torch`", {"infer": True}, own={"infer": False}, cold=True),
)
SECTIONS = tuple(dict.fromkeys(row.task for row in ROWS))

COLUMNS = (
    *("", "ours", "diffusers", "speed, theirs / ours"),
    *("memory, ours", "diffusers", "ours / theirs"),
    "difference",
)
# The largest relative L2 difference that is rounding alone.
ROUNDING = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
QUIET = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.bench", __doc__)
    add = parser.add_argument
    add("--case", choices=CASES, default="tiny", help="models and size of the images (default: %(default)s)")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure (default: all)")
    add("--rounds", type=positive, default=5, metavar="N", help="processes of each side (default: %(default)s)")
    add("--threads", type=positive, metavar="N", help="of a CPU (default: PyTorch's own choice)")
    add_device(parser)
    add("--precision", choices=PRECISION_NAMES, default="fp32", help=f"{PRECISION_HELP} (default: %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="keep SD 1.5's models here, 11 GB (default: do not keep them)")
    return run_tool(parser, argv, bench, stopped="the lines above hold")


def bench(args: argparse.Namespace) -> int:
    os.environ.update(QUIET)
    tiny = args.case == "tiny"
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) if tiny or args.folder is None else args.folder
        note(f"the models go to {folder} ...")
        wanted = (args.case, folder, args.device, args.threads, args.precision)
        machine, described = in_a_process("writing the models", "bench_ours", "prepare", *wanted)
        setup = CASES[args.case] | machine | {"folder": folder}
        if machine["device"].startswith("cuda"):
            setup["steps"] = STEPS_ON_A_GPU
        print(f"{args.case}, {setup['precision']}: {described}; medians of {args.rounds} rounds\n", flush=True)
        if "reuse" in args.only and not tiny:
            note("reuse is measured with --case tiny alone: judging it takes models that have learned something")
        rows = [row for row in ROWS if row.task in args.only and (tiny or row.task != "reuse")]
        return report(rows, setup, args.rounds)


def report(rows: Sequence[Row], setup: dict[str, Any], rounds: int) -> int:
    """Prints the table, each row as soon as it is measured -> the exit status."""
    if not have_peers():
        note("diffusers is not installed, so there is no comparison: pip install -r tests/requirements-interop.txt")
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}", flush=True)
    wrong = []
    for row in rows:
        line, difference = compared(row, setup, rounds)
        print(f"| {' | '.join(line)} |", flush=True)
        if difference > ROUNDING[setup["precision"]]:
            wrong.append(line[0])
    if wrong:
        note(f"bench: outputs differ by more than rounding, {ROUNDING[setup['precision']]:g}: {'; '.join(wrong)}")
    return 1 if wrong else 0


def have_peers() -> bool:
    return all(find_spec(package) for package in ("diffusers", "transformers"))


def compared(row: Row, setup: dict[str, Any], rounds: int) -> tuple[list[str], float]:
    """Measures both sides of a row, or ours alone without diffusers -> its cells, and the largest relative difference
    of the outputs: nan if none are compared."""
    sides = [("bench_ours", row.arguments)]
    if row.own is not None:
        sides.append(("bench_ours", row.own))
    elif have_peers():
        sides.append(("bench_peers", row.arguments))
    if row.cold:
        in_turns(row, sides, setup, 1)  # does not count: files may come from the disk
    measured = in_turns(row, sides, setup, rounds)
    seconds = [statistics.median(time for measurement in side for time in measurement.seconds) for side in measured]
    memory = [max(measurement.memory for measurement in side) for side in measured]
    if row.task == "start":
        memory = [math.nan, math.nan]  # of programs that are started, which is not measured
    what, differing = row.what.format(**setup), math.nan
    outputs = [[measurement.outputs for measurement in side] for side in measured]
    if row.task == "reuse":
        what += f", PSNR {psnr(*(side[0]['images'] for side in outputs)):.1f} dB"
    elif len(sides) == 2:
        differing = max(map(difference, *outputs))
    return cells(what, seconds, memory, differing), differing


def in_turns(row: Row, sides: Sequence[tuple[str, dict]], setup: dict[str, Any], rounds: int) -> list[list]:
    """-> for each side its measurements, each from a new process. A round has one of each, in alternating order, so
    that whatever slows the machine slows both."""
    measured = [[] for _ in sides]
    for i in range(rounds):
        for (module, arguments), measurements in list(zip(sides, measured, strict=True))[:: -1 if i % 2 else 1]:
            how = (module, row.task, arguments, setup, row.cold)
            measurements.append(in_a_process(f"{module}.{row.task}", "bench_case", "measure", *how))
    return measured


def in_a_process(what: str, module: str, function: str, *arguments) -> Any:
    """Calls a function of tools/ in a new process, whose memory is its own. Raises ValueError if it fails there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a fork would share our memory
        try:
            return pool.submit(call, module, function, *arguments).result()
        except (ValueError, OSError):
            raise
        except Exception as error:
            why = f"failed with {type(error).__name__}: {error}"
            if isinstance(error, BrokenProcessPool):
                why = "was killed, probably for want of memory: take a smaller --case, or leave it out of --only"
            raise ValueError(f"{what} {why}") from error


def call(module: str, function: str, *arguments) -> Any:
    """By name, as the modules import PyTorch, which --help does without."""
    return getattr(import_module(f"tools.{module}"), function)(*arguments)


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest relative L2 difference of arrays of the same names; nan if there are none, inf if one is not finite
    or of another shape."""
    return max((relative(ours[name], theirs[name]) for name in ours.keys() | theirs.keys()), default=math.nan)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """In 8-bit images one level of 255 is rounding."""
    if ours.shape != theirs.shape:
        return math.inf
    level = 1 if ours.dtype == np.uint8 else 0
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    value = np.linalg.norm(np.maximum(np.abs(ours - theirs) - level, 0)) / np.linalg.norm(theirs)
    return float(value) if np.isfinite(value) else math.inf


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Of 8-bit images, in dB, from the mean error of all."""
    error = np.square(images.astype(np.float64) - others).mean()
    return float(10 * np.log10(255**2 / error)) if error else math.inf


def cells(what: str, seconds: Sequence[float], memory: Sequence[float], difference: float) -> list[str]:
    """The cells under COLUMNS, from seconds and bytes of ours and, if there are any, theirs; nan makes an empty one."""
    (s, other_s), (m, other_m) = ((*x, math.nan)[:2] for x in (seconds, memory))
    return [
        *(what, shown(s, ".3g", " s"), shown(other_s, ".3g", " s"), shown(other_s / s, ".2f")),
        *(shown(m / 1e9, ".2f", " GB"), shown(other_m / 1e9, ".2f", " GB"), shown(m / other_m, ".2f")),
        shown(difference, ".1e"),
    ]


def shown(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{form}}{unit}"


if __name__ == "__main__":
    sys.exit(main())
