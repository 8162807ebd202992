"""Hints for a folder of pictures, or of pose files and maps: one PNG for each, of the same name.

    python -m tools.make_hints canny photos/ hints/
    python -m tools.make_hints canny photos/ hints/ --option low=50 --option high=150 --size 512

Folders in the folder are gone through, too. Hints that are there already are left alone, so that a run that was stopped
goes on where it was. A file that can't be read or worked on is named at the end, and the exit status is then 1.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # for `python tools/make_hints.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from PIL import Image

from controlnet.hints import (
    DETECTORS,
    LEARNED_NOTE,
    NotInstalledError,
    detect_file,
    find_detector,
    in_words,
    options_of,
    parse_options,
)
from tools.cli import note, run

NAMED_AT_MOST = 20  # bad files, at the end

Failure = tuple[Path, str]  # a file without a hint, and why


def main(argv: list[str] | None = None) -> int:
    return run("make_hints", make_all, parse_args(argv))


def make_all(args: argparse.Namespace) -> int:
    """The exit status: 1 if a file has no hint."""
    failures = make_hints(args)
    for path, reason in failures[:NAMED_AT_MOST]:
        note(f"no hint for {path}: {reason}")
    if len(failures) > NAMED_AT_MOST:
        note(f"... and for {len(failures) - NAMED_AT_MOST} more")
    return 1 if failures else 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_hints",
        description=__doc__,
        epilog=detectors_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("detector", metavar="DETECTOR", help="one of those below")
    parser.add_argument("in_dir", type=Path, metavar="IN_DIR", help="the folder of pictures, pose files or maps")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder for the hints, made if needed")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the detector, see below; repeatable"
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="pixels of the hints' short side, a multiple of 64; pictures are brought to it before the detector sees "
        "them, as what it finds depends on it (default: the size of each picture)",
    )
    parser.add_argument("--replace", action="store_true", help="make the hints that are there already again")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def detectors_help() -> str:
    lines = ["detectors, and their options with the defaults:"]
    for name, detector in DETECTORS.items():
        options = f" ({in_words(options_of(name))})" if options_of(name) else ""
        lines.append(f"  {name:13} {detector.about}{options}")
    return "\n".join([*lines, "", LEARNED_NOTE])


def make_hints(args: argparse.Namespace) -> list[Failure]:
    """All hints that are not there yet. Returns the files that have none, with the reasons."""
    options = parse_options(args.detector, args.option)
    if args.size is not None and (args.size < 64 or args.size % 64):
        raise ValueError(f"--size is {args.size}, expected a multiple of 64 pixels")
    check_folders(args.in_dir, args.out_dir)
    places, clashes = hint_places(args.detector, args.in_dir, args.out_dir)
    missing = {place: source for place, source in places.items() if args.replace or not place.exists()}

    # Imported here, because it takes seconds: --help does not need it.
    from tqdm import tqdm

    from controlnet.common.images import save_png

    failures = []
    for place, source in tqdm(missing.items(), unit="hint", disable=None):
        try:
            hint = make_hint(args.detector, source, args.size, options)
        except NotInstalledError:  # the next files would fare no better
            raise
        except Exception as error:  # whatever a detector dislikes about one picture, the others get their hints
            failures.append((source, str(error) or type(error).__name__))
            continue
        save_png(hint, place, {})
    print(
        f"{len(missing) - len(failures)} hints made in {args.out_dir}, {len(places) - len(missing)} were there already"
    )
    return failures + clashes


def make_hint(name: str, source: Path, size: int | None, options: dict) -> Image.Image:
    from controlnet.common.images import fitted_size, resized

    def fit(image: Image.Image) -> Image.Image:
        return resized(image, fitted_size(image, size, 64))

    return Image.fromarray(detect_file(name, source, fit if size else None, **options))


def check_folders(in_dir: Path, out_dir: Path) -> None:
    """Raises ValueError if there is nothing to read from or nowhere to write to; OUT_DIR is there afterwards."""
    if not in_dir.is_dir():
        raise ValueError(f'IN_DIR is "{in_dir}", expected a folder')
    if out_dir.resolve().is_relative_to(in_dir.resolve()):
        raise ValueError(f'OUT_DIR "{out_dir}" is in IN_DIR, so that hints would be taken for pictures: choose another')
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f'OUT_DIR is "{out_dir}", which cannot be a folder ({error.strerror}): choose another'
        ) from error


def hint_places(name: str, in_dir: Path, out_dir: Path) -> tuple[dict[Path, Path], list[Failure]]:
    """Each hint's place and the file it is made from, in order, and the files whose hint's place is another's.

    Raises ValueError for a folder without files that the detector reads.
    """
    suffixes = find_detector(name).suffixes
    sources = [path for path in sorted(in_dir.rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
    if not sources:
        raise ValueError(f'there is no file for {name} in "{in_dir}", expected {", ".join(suffixes)}')
    places, clashes = {}, []
    for source in sources:
        place = out_dir / source.relative_to(in_dir).with_suffix(".png")
        first = places.setdefault(place, source)
        if first != source:
            clashes.append((source, f"its hint would have the name of that for {first}: rename one of them"))
    return places, clashes


if __name__ == "__main__":
    sys.exit(main())
