"""Accepts the code on a machine: does it compute there what it computes on a CPU, in what time and memory?

    python -m tools.accept --device cuda --minutes 9 --out accept.json
    python -m tools.accept --device cuda --minutes 3 --out accept.json --only forward,step
    python -m tools.accept --device cpu --size tiny --out accept.json        # the program itself, tried in a minute

SD 1.5 and a ControlNet are made from random numbers, so nothing is downloaded. What they compute is compared with what
another process computes on the CPU in fp32. If diffusers is installed, it is measured, too. Results go to --out, row by
row, as JSON, and at the end to a table beside it (accept.md). A later call with --only adds to the file.

Each stage gets its share of the minutes that are left; what it has no time for is "not run". The exit status is 0 if
all that must hold does, 1 if something does not, fails, or was not run, 2 for a mistake in the call.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from controlnet.common.program import new_parser, note, positive_number
from tools.acceptance.report import Report, Skip
from tools.bench import QUIET
from tools.cli import add_device, run_tool


@dataclass(frozen=True)
class Stage:
    seconds: float  # its share of nine minutes
    home: str  # its function, by the stage's name, is in this module of tools/acceptance
    what: str


STAGES = {
    "machine": Stage(10, "figures", "versions, a large matrix product, the copy rate"),
    "weights": Stage(35, "exact", "the models are made; the CPU begins the reference, in the background"),
    "training": Stage(70, "programs", "train.py on the small model: precisions, workers, resume to the bit"),
    "forward": Stage(40, "exact", "text, UNet with control, VAE and pictures against the CPU"),
    "step": Stage(40, "exact", "loss and gradients of a training step against the CPU"),
    "infer": Stage(60, "programs", "infer.py: samplers, masks, --again, --low-memory"),
    "peers": Stage(125, "figures", "images and training steps in turns with diffusers"),
    "memory": Stage(30, "figures", "training's memory, predicted and measured"),
    "out_of_memory": Stage(15, "programs", "what is said, and that nothing is lost"),
    "profile": Stage(30, "figures", "kernels and waits of a denoising and a training step"),
    "fill50k": Stage(85, "programs", "train.py --data fill50k, whole"),
}
SPARE = 1.5  # a stage may take so many times its share


class OutOfTime(BaseException):
    """Not an Exception, which the programs that are run would turn into a sentence."""


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.accept", __doc__)
    add = parser.add_argument
    stages = "; ".join(f"{name}: {stage.what}" for name, stage in STAGES.items())
    add("--out", type=Path, required=True, metavar="FILE", help="results, as JSON; stages that it holds are kept")
    add_device(parser)
    add("--minutes", type=positive_number, default=9, metavar="N", help="in all (default: %(default)s)")
    add("--only", type=stage_names, default=tuple(STAGES), metavar="STAGE,...", help=f"(default: all). {stages}")
    add("--size", choices=("full", "tiny"), default="full", help="of the models and images (default: %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="keep models and reference here, 9 GB (default: do not keep them)")
    return run_tool(parser, argv, accept, stopped="{out} holds what was found")


def stage_names(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f'there is no stage "{unknown[0]}", expected some of {", ".join(STAGES)}')
    return tuple(name for name in STAGES if name in names)


def accept(args: argparse.Namespace) -> int:
    if args.out.suffix == ".md":
        raise ValueError(f"--out is {args.out}, where the table would replace the results: let it end in .json")
    end = time.monotonic() + 60 * args.minutes
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before PyTorch: --deterministic needs it
    os.environ.update(QUIET)
    job_module = import_module("tools.acceptance.job")  # imports PyTorch, which --help does without
    with job_module.job(args.device, args.size, args.folder) as job:
        report = Report(args.out, device=str(job.device), size=args.size)
        for i, name in enumerate(args.only):
            left = end - time.monotonic()
            share = STAGES[name].seconds / sum(STAGES[other].seconds for other in args.only[i:])
            do_stage(name, job, report, min(left, SPARE * share * left))
    args.out.with_suffix(".md").write_text(report.markdown())
    broken = report.broken()
    note(f"{args.out}: {f'{len(broken)} broken: ' + '; '.join(broken) if broken else 'all that must hold does'}")
    return 1 if broken else 0


def do_stage(name: str, job: Any, report: Report, seconds: float) -> None:
    """Runs a stage for so many seconds at most. Whatever happens in it is recorded, and the next stage follows."""
    report.begin(name)
    if seconds <= 0:
        return report.end(name, "not run", "no time was left")
    try:
        with at_most(seconds):
            job.settle()
            stage(name)(job, report)
        state, why = "done", ""
    except OutOfTime:
        state, why = "not run", f"the rest of it: {seconds:.0f} s were not enough"
    except Skip as skip:
        state, why = "skipped", str(skip)
    except Exception as error:
        state, why = "failed", f"{type(error).__name__}: {error}"
        note(traceback.format_exc())
    report.end(name, state, why)
    note(f"{name}: {state} {why}".rstrip())


def stage(name: str) -> Callable[[Any, Report], None]:
    return getattr(import_module(f"tools.acceptance.{STAGES[name].home}"), name)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside after so many seconds, at the next line of Python; never on Windows, which has no
    alarm."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
