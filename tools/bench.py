"""Measures speed and memory beside diffusers, with the same weights, sizes, precision and number of threads.

    python -m tools.bench                        # the small models of weights/: minutes
    python -m tools.bench --case sd15-256        # SD 1.5 at full size, filled with numbers: half an hour on two cores
    python -m tools.bench --case sd15-512 --device cuda --dtype fp16
    python -m tools.bench --only sampling vae --rounds 9

Prints a table to paste. Both sides work in turns, each in a process of its own, as its users run it: ours with packed
weights and kept memory on a CPU, as infer.py and train.py do. Training at 512x512 is with gradient checkpointing on
both sides, as each does it, and needs 16 GB. Times are medians of the rounds after a warm-up. Memory is the peak above
what Python and its packages need, weights included; on CUDA what is allocated there. Outputs are compared in every
round, but for --reuse, which is approximate: where they differ by more than rounding (in fp32 1e-4 of their norm) the
exit status is 1. The share of the GEMM peak is each side's own arithmetic in matrix products, convolutions and
attention, by the time it took, over the rate of a large matrix product in the same rounds.
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

if not __package__:  # for `python tools/bench.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import dataclass

from controlnet.training.options import positive
from tools.cli import DTYPES, add_debug, new_parser, note, run

if TYPE_CHECKING:  # these import PyTorch, which --help does without
    import numpy as np

    from tools.bench_processes import Measurement, Setup, Side, Task

ROOT = Path(__file__).resolve().parent.parent
CASES = ("tiny", "sd15-256", "sd15-512")
SECTIONS = ("sampling", "reuse", "vae", "training", "loading", "start")
QUIET = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}

# The largest relative L2 difference of outputs that is rounding alone.
ROUNDING = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


# ---------------------------------------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> int:
    return run("bench", bench, parse_args(argv), stopped="the lines above hold")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("bench", __doc__)
    parser.add_argument(
        "--case", choices=CASES, default="tiny", help="models and pictures' side (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure (default: all)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="measurements (default: %(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of a CPU (default: PyTorch's own choice)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where the 11 GB of the sd15 cases are written, and found again (default: temporary)",
    )
    add_debug(parser)
    return parser.parse_args(argv)


def bench(args: argparse.Namespace) -> int:
    os.environ.update(QUIET)
    import torch  # these take seconds: --help does not need them

    from controlnet.common.devices import pick_device
    from tools.bench_processes import Case, Setup

    cases = {
        "tiny": Case(size=128, steps=20, cfg=2.5, batch_size=8),
        "sd15-256": Case(size=256, steps=2, cfg=7.5, batch_size=1),
        "sd15-512": Case(size=512, steps=2, cfg=7.5, batch_size=4, checkpointing=True, trains_alone=True),
    }
    if args.threads:
        torch.set_num_threads(args.threads)
    with models(args) as folder:
        device = str(pick_device(args.device))
        setup = Setup(cases[args.case], folder, device, args.dtype, torch.get_num_threads())
        print(f"{args.case}: {described(setup, args.rounds)}\n", flush=True)
        return report(setup, args.only, args.rounds)


@contextmanager
def models(args: argparse.Namespace) -> Iterator[Path]:
    """The folder with the models of the case."""
    from tools.bench_ours import write_sd15, write_tiny
    from tools.bench_processes import in_a_process

    with TemporaryDirectory() as temporary:
        if args.case == "tiny":
            folder, write = Path(temporary), write_tiny
        else:
            folder, write = args.folder or Path(temporary), write_sd15
            note(f"the models go to {folder} ...")
        folder.mkdir(parents=True, exist_ok=True)
        in_a_process(write, folder)
        yield folder


def described(setup: "Setup", rounds: int) -> str:
    import torch

    peers = f", diffusers {peer_version()}" if peer_version() else ""
    name = torch.cuda.get_device_name(setup.device) if setup.device.startswith("cuda") else setup.device
    return (
        f"{name}, {setup.threads} threads, {setup.precision}, PyTorch {torch.__version__}{peers}; "
        f"medians of {rounds} rounds"
    )


def peer_version() -> str | None:
    """Of diffusers, where it is installed with all that it needs here."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("transformers")
        return version("diffusers")
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Took:
    """What one side needed. What is not known is nan."""

    seconds: float
    memory: float  # bytes
    gemm_share: float = math.nan


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: Took
    theirs: Took | None = None  # where diffusers is not installed
    difference: float | None = None  # of the outputs, the largest relative one; None where there are none to compare


def rows(setup: "Setup", sections: Sequence[str], rounds: int) -> Iterator[Row]:
    """Each as soon as it is measured."""
    from tools import bench_ours as ours
    from tools.bench_processes import Anew, Program

    theirs = peers()
    case, side = setup.case, f"{setup.case.size}x{setup.case.size}"
    step = f"a training step, batch {case.batch_size} of {side}"
    if "reuse" in sections and case.size != 128:
        note("reuse is measured with --case tiny alone: it is judged on models that have learned something")
    elif "reuse" in sections:
        yield reuse_row(f"{3 * ours.SAMPLES} pictures of the worlds", setup, rounds)
    working = [
        ("sampling", f"a picture of {side}, {case.steps} steps", ours.sampling, theirs and theirs.sampling),
        ("vae", f"VAE, encoding {side}", ours.vae_encode, theirs and theirs.vae_encode),
        ("vae", "the same in strips (--low-memory)", ours.vae_encode_in_strips, theirs and theirs.vae_encode),
        ("vae", f"VAE, decoding {side}", ours.vae_decode, theirs and theirs.vae_decode),
        ("vae", "the same in strips (--low-memory)", ours.vae_decode_in_strips, theirs and theirs.vae_decode),
        ("training", f"{step}, encoded before", ours.training_cached, theirs and theirs.training),
        ("training", f"{step}, encoded in it", ours.training_uncached, theirs and theirs.training),
    ]
    for section, what, our_task, their_task in working:
        if section in sections:
            tasks = [our_task, their_task] if their_task else [our_task]
            yield working_row(what, tasks, setup, rounds, alone=section == "training" and case.trains_alone)
    if "loading" in sections:
        tasks = [ours.loading, theirs.loading] if theirs else [ours.loading]
        yield starting_row("loading base and ControlNet", [Anew(task, setup) for task in tasks], rounds)
    if "start" in sections:
        infer = [sys.executable, str(ROOT / "infer.py"), "--hint", "circle.png", "--steps", "1"]
        infer += ["--device", setup.device, "--dtype", setup.precision, "--out", str(setup.folder / "start.png")]
        commands = [infer, [sys.executable, "-c", "import torch"]]
        programs = [Program(command, setup.threads) for command in commands]
        yield starting_row("infer.py, one small step; beside it `import torch`", programs, rounds)


def peers() -> ModuleType | None:
    if peer_version() is None:
        note("diffusers is not installed, so there is no comparison: pip install -r tests/requirements-interop.txt")
        return None
    from tools import bench_peers

    return bench_peers


def working_row(what: str, tasks: Sequence["Task"], setup: "Setup", rounds: int, alone: bool) -> Row:
    """Of tasks whose processes stay, or with the machine's memory for each `alone`; with a matrix product in each round
    to see what the machine can do then."""
    from tools.bench_processes import Anew, MatrixProduct, Worker, in_turns

    with ExitStack() as stack:
        if alone:
            workers = [Anew(task, setup, warm=True) for task in tasks]
        else:
            workers = []
            for task in tasks:  # one after the other: loading takes memory
                workers.append(stack.enter_context(closing(Worker(task, setup))))
                workers[-1].measure()  # the warm-up
        product = MatrixProduct(setup)
        *sides, products = in_turns([*workers, product], rounds)
        counts = [worker.count() for worker in workers]
    peak = product.operations / min(measurement.seconds for measurement in products)
    shares = [count / median_seconds(side) / peak for count, side in zip(counts, sides, strict=True)]
    return row(what, sides, shares)


def reuse_row(what: str, setup: "Setup", rounds: int) -> Row:
    """With features reused and in full: how much faster, and how near."""
    from tools import bench_ours as ours
    from tools.bench_processes import Worker, in_turns

    with ExitStack() as stack:
        tasks = (ours.sampling_with_reuse, ours.sampling_in_full)
        workers = [stack.enter_context(closing(Worker(task, setup))) for task in tasks]
        in_turns(workers, 1)  # the warm-up
        reused, full = in_turns(workers, rounds)
    near = decibels(reused[0].outputs["pictures"], full[0].outputs["pictures"])
    took = [Took(median_seconds(side), max(measurement.memory for measurement in side)) for side in (reused, full)]
    return Row(f"{what} with --reuse 2, PSNR {near:.1f} dB; beside it the same in full", *took)


def decibels(pictures: "np.ndarray", others: "np.ndarray") -> float:
    """The peak signal-to-noise ratio of 8-bit pictures, from the mean error of all."""
    import numpy as np

    error = np.square(pictures.astype(np.float64) - others).mean()
    return float(10 * np.log10(255**2 / error)) if error else math.inf


def starting_row(what: str, sides: Sequence["Side"], rounds: int) -> Row:
    """Of what begins anew each time; the first time, when files come from the disk, does not count."""
    from tools.bench_processes import in_turns

    in_turns(sides, 1)
    return row(what, in_turns(sides, rounds), [math.nan] * len(sides))


def row(what: str, sides: Sequence[Sequence["Measurement"]], gemm_shares: Sequence[float]) -> Row:
    """From the measurements of ours and, if there are any, theirs."""
    took = [
        Took(median_seconds(side), max(measurement.memory for measurement in side), share)
        for side, share in zip(sides, gemm_shares, strict=True)
    ]
    if len(took) == 1:
        return Row(what, *took)
    differences = [difference(ours.outputs, theirs.outputs) for ours, theirs in zip(*sides, strict=True)]
    return Row(what, *took, None if None in differences else max(differences))


def median_seconds(measurements: Sequence["Measurement"]) -> float:
    return statistics.median(measurement.seconds for measurement in measurements)


def difference(ours: dict, theirs: dict) -> float | None:
    """The largest relative L2 difference of arrays of the same names; None if there are none, inf if one cannot be
    told. In 8-bit pictures one level of 255 is rounding."""
    found = [relative(ours[name], theirs[name]) for name in ours.keys() | theirs.keys()]
    return max(found, default=None)


def relative(ours: "np.ndarray", theirs: "np.ndarray") -> float:
    import numpy as np

    if ours.shape != theirs.shape:
        return math.inf
    level = 1 if ours.dtype == np.uint8 else 0
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    value = np.linalg.norm(np.maximum(np.abs(ours - theirs) - level, 0)) / np.linalg.norm(theirs)
    return float(value) if np.isfinite(value) else math.inf


# ------------------------------------------------------------------------------------------------------------ the table


COLUMNS = (
    *("", "ours", "diffusers", "speed, theirs / ours"),
    *("memory, ours", "diffusers", "ours / theirs"),
    *("GEMM peak, ours", "diffusers", "difference"),
)


def report(setup: "Setup", sections: Sequence[str], rounds: int) -> int:
    """Prints the table, each row when it is there -> the exit status."""
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}", flush=True)
    wrong = []
    for measured in rows(setup, sections, rounds):
        print(f"| {' | '.join(cells(measured))} |", flush=True)
        if measured.difference is not None and measured.difference > ROUNDING[setup.precision]:
            wrong.append(measured.what)
    if wrong:
        note(f"bench: outputs differ by more than rounding, {ROUNDING[setup.precision]:g}: {'; '.join(wrong)}")
    return 1 if wrong else 0


def cells(row: Row) -> list[str]:
    ours, theirs = row.ours, row.theirs or Took(math.nan, math.nan)
    return [
        row.what,
        *(shown(ours.seconds, ".3g", " s"), shown(theirs.seconds, ".3g", " s")),
        shown(theirs.seconds / ours.seconds, ".2f"),
        *(shown(ours.memory / 1e9, ".2f", " GB"), shown(theirs.memory / 1e9, ".2f", " GB")),
        shown(ours.memory / theirs.memory, ".2f"),
        *(shown(ours.gemm_share, ".0%"), shown(theirs.gemm_share, ".0%")),
        shown(math.nan if row.difference is None else row.difference, ".1e"),
    ]


def shown(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{form}}{unit}"


if __name__ == "__main__":
    sys.exit(main())
