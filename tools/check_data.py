"""Reads every pair of a folder as training would, and lists those that cannot be used.

    python -m tools.check_data my/pairs

The exit status is 0 if all are good, 1 if some are bad, and 2 if there is nothing to train on.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # for `python tools/check_data.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of pairs, in any layout that train.py takes")
    parser.add_argument("--no-hints", action="store_true", help="hints will be made from the pictures (--detect)")
    parser.add_argument("--hint-channels", type=int, default=3, metavar="N", help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        good, problems = check(args)
    except (ValueError, OSError) as error:
        print(f"check_data: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    print(f"{good} pairs are good, {len(problems)} are bad")
    return 1 if problems else 0


def check(args: argparse.Namespace) -> tuple[int, list[str]]:
    """-> (how many are good, a sentence for each that is not)"""
    from tqdm import tqdm

    from controlnet.training.folders import list_folder

    listing = list_folder(args.folder, need_hints=not args.no_hints)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda entry: list(problems_of(entry, args.hint_channels)), listing.entries)
        found = list(tqdm(found, "pairs", len(listing.entries), disable=None))
    problems = [problem for several in found for problem in several]
    return sum(not several for several in found), listing.problems + problems


def problems_of(entry, hint_channels: int) -> Iterator[str]:
    from controlnet.training.folders import BadSample, check_same_shape, read_hint, read_picture

    try:
        image = read_picture(entry.image)
        if entry.hint is not None:
            check_same_shape(image, read_hint(entry.hint, hint_channels), entry)
    except BadSample as error:
        yield str(error)


if __name__ == "__main__":
    sys.exit(main())
