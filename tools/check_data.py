"""Reads every pair of a folder as training would, and lists those that cannot be used.

    python -m tools.check_data my/pairs

The exit status is 0 if all pairs are good, 1 if some are bad, and 2 if there is nothing to train on.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from controlnet.common.program import new_parser, run
from tools.cli import add_debug


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.check_data", __doc__)
    parser.add_argument("folder", type=Path, help="of pairs, in any layout that train.py takes")
    parser.add_argument("--no-hints", action="store_true", help="hints will be made from the images (--detect)")
    parser.add_argument("--hint-channels", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run("check_data", lambda: check(args), args.debug)


def check(args: argparse.Namespace) -> int:
    """The exit status."""
    from tqdm import tqdm

    from controlnet.training.folders import check_same_shape, read_hint, read_pixels
    from controlnet.training.pairs import BadSample, list_folder

    def problem_of(entry) -> str | None:
        try:
            image = read_pixels(entry.image)
            if entry.hint is not None:
                check_same_shape(image, read_hint(entry.hint, args.hint_channels), entry)
        except BadSample as error:
            return str(error)

    listing = list_folder(args.folder, need_hints=not args.no_hints)
    with ThreadPoolExecutor() as pool:
        found = list(tqdm(pool.map(problem_of, listing.entries), "pairs", len(listing.entries), disable=None))
    problems = listing.problems + [problem for problem in found if problem]
    for problem in problems:
        print(problem)
    print(f"{found.count(None)} pairs are good, {len(problems)} are bad")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
