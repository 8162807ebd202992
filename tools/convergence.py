"""Makes one image of a training run: a few hints, and what the ControlNet made of them step by step.

python -m tools.convergence runs/control --out assets/convergence.png
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from controlnet.common.images import save_png
from controlnet.common.program import new_parser, positive
from controlnet.training.previews import text_image
from controlnet.training.run_state import RunFolder
from tools.cli import check_picture, run_tool

CAPTION = 20  # pixels above each column


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.convergence", __doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/control"), help="(default: %(default)s)")
    parser.add_argument("--rows", type=positive, default=2, help="hints, the first of its grids (default: %(default)s)")
    parser.add_argument("--columns", type=positive, default=8, help="steps, spread evenly (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("convergence.png"), help="(default: %(default)s)")
    return run_tool(parser, argv, make_strip)


def make_strip(args: argparse.Namespace) -> None:
    """Raises ValueError for a folder without grids, or a place where no PNG can be written."""
    check_picture(args.out, "--out")
    run_folder = RunFolder(args.run)
    grids = run_folder.grids()
    if not grids:
        raise ValueError(f"{args.run} has no grids in samples/: give the folder of a run of train.py")
    chosen = [grids[i] for i in sorted({round(i) for i in np.linspace(0, len(grids) - 1, args.columns)})]
    ious = {line["step"]: line["iou"] for line in run_folder.logged() if "iou" in line}

    hints, _, truths = images_in(run_folder, chosen[0], args.rows)
    columns = [column("hint", hints)]
    for path in chosen:
        step = int(path.stem)
        caption = f"step {step}" + (f", IoU {ious[step]:.2f}" if step in ious else "")
        columns.append(column(caption, images_in(run_folder, path, args.rows)[1]))
    columns.append(column("truth", truths))
    save_png(Image.fromarray(np.hstack(columns)), args.out, {})
    print(args.out)


def images_in(run_folder: RunFolder, grid_file: Path, rows: int) -> tuple[list[np.ndarray], ...]:
    """Hints, samples and truths, uint8 (H, W, 3), of a grid's first rows. Its fourth column is text."""
    grid = np.asarray(Image.open(grid_file).convert("RGB"))
    width = grid.shape[1] // 4
    height = row_height(run_folder, width)
    top_rows = [grid[y : y + height] for y in range(0, len(grid), height)][:rows]
    return tuple([row[:, x * width : (x + 1) * width] for row in top_rows] for x in range(3))


def row_height(run_folder: RunFolder, width: int) -> int:
    """The height of images of this width, which are square if no settings are left to tell."""
    with suppress(ValueError):
        height, width_trained = run_folder.written()["data"].get("size", (1, 1))
        return height * width // width_trained
    return width


def column(caption: str, images: list[np.ndarray]) -> np.ndarray:
    width = images[0].shape[1]
    return np.vstack([text_image([caption], (CAPTION, width)), *images])


if __name__ == "__main__":
    sys.exit(main())
