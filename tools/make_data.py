"""Writes the pictures of a procedural world to disk, in the layout of the published fill50k.

python -m tools.make_data people --count 1000 --out data/people
python train.py --data data/people
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # for `python tools/make_data.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", help="fill50k, people, shapes or edges")
    parser.add_argument("--count", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--size", type=int, default=512, help="of a side, in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="pictures that no seed trains on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        make(args)
    except (ValueError, OSError) as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2
    return 0


def make(args: argparse.Namespace) -> None:
    from PIL import Image
    from tqdm import tqdm

    from controlnet.common.images import save_png
    from controlnet.training.run_state import write_text
    from controlnet.worlds import WORLDS

    if args.world not in WORLDS:
        raise ValueError(f'there is no world "{args.world}": take one of {", ".join(WORLDS)}')
    if args.count < 1 or args.size < 8:
        raise ValueError(f"--count is {args.count} and --size {args.size}, expected at least 1 and 8")
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty: give a new folder as --out")
    world, lines = WORLDS[args.world](args.size, args.seed, held_out=args.held_out), []
    for i in tqdm(range(args.count), args.world, unit="pair"):
        sample = world[i]
        names = {"source": f"source/{i}.png", "target": f"target/{i}.png"}
        save_png(Image.fromarray(sample.hint), args.out / names["source"], {})
        save_png(Image.fromarray(sample.image), args.out / names["target"], {})
        lines.append(json.dumps({**names, "prompt": sample.caption}))
    write_text(args.out / "prompt.json", "\n".join(lines) + "\n")  # the last: without it the folder holds nothing yet
    print(f"train with: python train.py --data {args.out}")


if __name__ == "__main__":
    sys.exit(main())
