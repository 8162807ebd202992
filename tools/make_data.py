"""Writes the samples of a synthetic dataset to disk, in the layout of the published fill50k.

python -m tools.make_data people --count 1000 --out data/people
python train.py --data data/people
"""

import argparse
import json
import sys
from pathlib import Path

from controlnet.common.program import count, new_parser, positive
from tools.cli import make_folder, run_tool


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.make_data", __doc__)
    datasets = "fill50k, people, shapes, scenes, canny, scribble, seg, depth, edits"
    parser.add_argument("world", metavar="DATASET", help=datasets)
    parser.add_argument("--count", type=positive, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new folder")
    parser.add_argument("--size", type=positive, default=512, help="of a side, in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=count, default=0, help="(default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="validation samples, which no seed trains on")
    return run_tool(parser, argv, make, stopped="{out} is not complete: remove it and start again")


def make(args: argparse.Namespace) -> None:
    from PIL import Image
    from tqdm import tqdm

    from controlnet.common.images import save_png
    from controlnet.training.run_state import write_text
    from controlnet.worlds import WORLDS

    if args.world not in WORLDS:
        raise ValueError(f'there is no dataset "{args.world}": take one of {", ".join(WORLDS)}')
    if args.size < 8:
        raise ValueError(f"--size is {args.size}, expected at least 8 pixels")
    make_folder(args.out, "--out")
    if any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty: give a new folder as --out")
    world, lines = WORLDS[args.world](args.size, args.seed, held_out=args.held_out), []
    for i in tqdm(range(args.count), args.world, unit="pair"):
        sample = world[i]
        names = {"source": f"source/{i}.png", "target": f"target/{i}.png"}
        save_png(Image.fromarray(sample.hint), args.out / names["source"], {})
        save_png(Image.fromarray(sample.image), args.out / names["target"], {})
        lines.append(json.dumps({**names, "prompt": sample.caption}))
    write_text(args.out / "prompt.json", "\n".join(lines) + "\n")  # last: a folder without it is not a dataset
    print(f"train with: python train.py --data {args.out}")


if __name__ == "__main__":
    sys.exit(main())
