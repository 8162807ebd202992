"""Makes a strip of pictures from a training run: a few hints, and what the ControlNet made of them step by step.

python -m tools.convergence runs/control --out assets/convergence.png
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # for `python tools/convergence.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json

import numpy as np
from PIL import Image

from controlnet.common.images import save_png
from controlnet.training.preview import written
from controlnet.training.run_state import RunFolder
from tools.cli import add_debug, new_parser, run

CAPTION = 20  # pixels above each column


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("convergence", __doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/control"), help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="hints, the first of its grids (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=8, help="steps, spread evenly (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("convergence.png"), help="(default: %(default)s)")
    add_debug(parser)
    return run("convergence", make_strip, parser.parse_args(argv))


def make_strip(args: argparse.Namespace) -> None:
    """Raises ValueError for a folder without grids."""
    grids = sorted((args.run / "samples").glob("[0-9]*.png"), key=lambda path: int(path.stem))
    if not grids:
        raise ValueError(f"{args.run} has no grids in samples/: give the folder of a run of train.py")
    chosen = [grids[i] for i in sorted({round(i) for i in np.linspace(0, len(grids) - 1, args.columns)})]
    measured = measures_of(RunFolder(args.run).log_file)

    hints, _, truths = pictures_of(chosen[0], args.rows)
    columns = [column("hint", hints)]
    for path in chosen:
        step = int(path.stem)
        caption = f"step {step}" + (f", IoU {measured[step]:.2f}" if step in measured else "")
        columns.append(column(caption, pictures_of(path, args.rows)[1]))
    columns.append(column("truth", truths))
    save_png(Image.fromarray(np.hstack(columns)), args.out, {})
    print(args.out)


def pictures_of(path: Path, rows: int) -> tuple[list[np.ndarray], ...]:
    """Hints, pictures and truths, uint8 (side, side, 3), of the first rows of a grid, whose fourth column is text."""
    grid = np.asarray(Image.open(path).convert("RGB"))
    side = grid.shape[1] // 4
    top_rows = [grid[y : y + side] for y in range(0, len(grid), side)][:rows]
    return tuple([row[:, x * side : (x + 1) * side] for row in top_rows] for x in range(3))


def measures_of(log: Path) -> dict[int, float]:
    """Step -> the mean IoU of its grid, where the truth is known."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line["step"]: line["iou"] for line in lines if "iou" in line}


def column(caption: str, pictures: list[np.ndarray]) -> np.ndarray:
    width = pictures[0].shape[1]
    return np.vstack([written([caption], (CAPTION, width)), *pictures])


if __name__ == "__main__":
    sys.exit(main())
