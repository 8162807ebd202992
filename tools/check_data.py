"""Reads every pair of a folder as training would, and says what is wrong or odd: with the files' names and what to do.

    python -m tools.check_data my/pairs
    python -m tools.check_data my/pairs --size 768x512 --buckets --sheet sheet.png
    python -m tools.check_data photographs --detect canny --prompt "" --sheet sheet.png

It finds pairs that cannot be used; hints that are black, of one colour, inverted or label maps; images that are there
twice, share a hint or are left out; captions that are too long or garbled. It says what cropping cuts off, and what is
enlarged.

The exit status is 0 if nothing was found, crops and enlargements aside, 1 if something was, and 2 if there is nothing
to train on.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from controlnet.common.program import new_parser, positive, share, size_argument
from tools.cli import check_picture, run_tool

if TYPE_CHECKING:
    from controlnet.training.findings import Finding

NAMED_AT_MOST = 10  # files of a finding
PAIRS_OF_SHEET = 16


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.check_data", __doc__)
    parser.add_argument("folder", type=Path, help="of pairs, in any layout that train.py takes")
    add = parser.add_argument
    add("--size", type=size_argument, default="512", metavar="N|WxH", help="of the training (default: %(default)s)")
    add("--buckets", action="store_true", help="as in train.py: sizes in the shapes of the images")
    add("--detect", metavar="NAME", help="as in train.py: the hints are made from the images")
    add("--prompt", metavar="TEXT", help="as in train.py: one for all pairs, in place of captions; it may be empty")
    add("--prompt-dropout", type=share, default=0.5, metavar="P", help="as in train.py: 1 needs no captions")
    add("--hint-channels", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    add("--sheet", type=Path, metavar="FILE", help=f"write a picture of {PAIRS_OF_SHEET} pairs as training sees them")
    return run_tool(parser, argv, check)


def check(args: argparse.Namespace) -> int:
    from controlnet.common.images import save_png
    from controlnet.training.data import training_size
    from controlnet.training.findings import look_at_folder, look_at_pairs
    from controlnet.training.framing import framing
    from controlnet.training.pairs import Wanted, recognise
    from controlnet.training.sheet import contact_sheet, few_of
    from controlnet.training.sources import FolderSource
    from controlnet.training.transform import Transform, bucket_sizes
    from ldm.config import TINY

    if args.sheet:
        check_picture(args.sheet, "--sheet")
        if args.sheet.resolve().is_relative_to(args.folder.resolve()):
            raise ValueError(
                f"--sheet is {args.sheet}, in the folder of pairs, of which it would become a part: name another place"
            )
    size = training_size(args.size, TINY)  # which makes all sizes that the others make
    multiple = 32 if min(size) < 256 else 64  # of buckets' sides: as the small base has them, and SD
    transform = Transform(size, buckets=bucket_sizes(size, multiple) if args.buckets else ())
    listing = recognise(args.folder, Wanted(args.detect is None, args.prompt_dropout < 1, args.prompt))
    if listing.shards:
        raise ValueError(f'"{args.folder}" holds tar shards, expected files: unpack one of them to look into it')
    source = FolderSource(str(args.folder), listing.entries, transform, args.hint_channels, args.detect)
    unusable, odd = look_at_pairs(source)
    problems = listing.problems + unusable
    findings = [one for one in (*odd, *look_at_folder(args.folder, listing.entries)) if one.files]
    for line in (*problems, *(line for finding in findings for line in lines_of(finding)), *framing(source, multiple)):
        print(line)
    good = len(source) - len(unusable)
    print(f"{good} pairs are good, {len(problems)} are bad")
    samples = few_of(source, PAIRS_OF_SHEET) if args.sheet else []
    if samples:
        save_png(contact_sheet(samples), args.sheet, {})
        print(f"{len(samples)} pairs as training sees them: {args.sheet}")
    return 2 if not good else 1 if problems or findings else 0


def lines_of(finding: "Finding") -> Iterator[str]:
    yield f"{finding.what} ({len(finding.files)}): {finding.todo}"
    yield from (f"    {name}" for name in finding.files[:NAMED_AT_MOST])
    if len(finding.files) > NAMED_AT_MOST:
        yield f"    ... and {len(finding.files) - NAMED_AT_MOST} more"


if __name__ == "__main__":
    sys.exit(main())
