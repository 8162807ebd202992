"""The experiments of the ControlNet paper (arXiv 2302.05543) in miniature, and the questions that people ask of it.

    python -m tools.paper --out runs/paper                       # all of them: hours
    python -m tools.paper convergence cost --out runs/paper      # some
    python -m tools.paper --quick                                # a look, in ten minutes: too few steps for results

Trains what is missing, measures, and writes OUT/README.md with tables and pictures. Each experiment's numbers are kept
in OUT/NAME.json: those that are there, for the same options, are only drawn again. Everything that is trained lies in
OUT/runs, and no two experiments train the same. It can be stopped at any time: the same command goes on.
"""

import argparse
import signal
import sys
from pathlib import Path

from controlnet.common.program import PRECISION_HELP, PRECISION_NAMES, new_parser, positive
from tools.cli import add_device, make_folder, run_tool
from tools.paper import NAMES


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.paper", __doc__)
    names, choices = f"{', '.join(NAMES)} (default: all)", [*NAMES, []]  # argparse takes an empty list for a choice
    parser.add_argument("experiments", nargs="*", choices=choices, metavar="EXPERIMENT", help=names)
    folder = "the page's folder (default: runs/paper, with --quick runs/paper-quick)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=folder)
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps: no results, but a page")
    parser.add_argument("--seeds", type=positive, help="trainings of each kind (default: 3, with --quick 1)")
    parser.add_argument("--base", default="tiny", help="the locked base, a file or a preset (default: %(default)s)")
    precision = f"of the trainings: {PRECISION_HELP}. On CPUs bf16 pays with AVX512-BF16 only (default: %(default)s)"
    parser.add_argument("--precision", choices=PRECISION_NAMES, default="fp32", help=precision)
    add_device(parser)
    return run_tool(parser, argv, write_page, stopped="the same command goes on where it was")


def write_page(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.out = args.out or Path("runs/paper-quick" if args.quick else "runs/paper")
    make_folder(args.out, "--out")
    from tools.paper.lab import open_lab
    from tools.paper.page import draw_page, measured

    lab = open_lab(args)
    for name in args.experiments or NAMES:
        measured(name, lab)
        draw_page(args.out)
    print(args.out / "README.md")


if __name__ == "__main__":
    sys.exit(main())
