"""Makes one image of a training run: a few hints, and what the ControlNet made of them step by step.

python -m tools.convergence runs/control --out assets/convergence.png
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from controlnet.common.images import save_png
from controlnet.common.program import new_parser, run
from controlnet.training.previews import text_image
from controlnet.training.run_state import RunFolder
from tools.cli import add_debug

CAPTION = 20  # pixels above each column


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.convergence", __doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/control"), help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="hints, the first of its grids (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=8, help="steps, spread evenly (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("convergence.png"), help="(default: %(default)s)")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run("convergence", lambda: make_strip(args), args.debug)


def make_strip(args: argparse.Namespace) -> None:
    """Raises ValueError for a folder without grids."""
    grids = sorted((args.run / "samples").glob("[0-9]*.png"), key=lambda path: int(path.stem))
    if not grids:
        raise ValueError(f"{args.run} has no grids in samples/: give the folder of a run of train.py")
    chosen = [grids[i] for i in sorted({round(i) for i in np.linspace(0, len(grids) - 1, args.columns)})]
    ious = ious_by_step(RunFolder(args.run).log_file)

    hints, _, truths = images_of(chosen[0], args.rows)
    columns = [column("hint", hints)]
    for path in chosen:
        step = int(path.stem)
        caption = f"step {step}" + (f", IoU {ious[step]:.2f}" if step in ious else "")
        columns.append(column(caption, images_of(path, args.rows)[1]))
    columns.append(column("truth", truths))
    save_png(Image.fromarray(np.hstack(columns)), args.out, {})
    print(args.out)


def images_of(grid_file: Path, rows: int) -> tuple[list[np.ndarray], ...]:
    """Hints, samples and truths, uint8 (side, side, 3), of a grid's first rows. Its fourth column is text."""
    grid = np.asarray(Image.open(grid_file).convert("RGB"))
    side = grid.shape[1] // 4
    top_rows = [grid[y : y + side] for y in range(0, len(grid), side)][:rows]
    return tuple([row[:, x * side : (x + 1) * side] for row in top_rows] for x in range(3))


def ious_by_step(log: Path) -> dict[int, float]:
    """The mean IoU of each step's grid, where the true shape is known."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line["step"]: line["iou"] for line in lines if "iou" in line}


def column(caption: str, images: list[np.ndarray]) -> np.ndarray:
    width = images[0].shape[1]
    return np.vstack([text_image([caption], (CAPTION, width)), *images])


if __name__ == "__main__":
    sys.exit(main())
