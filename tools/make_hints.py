"""Makes hints for a folder of images, or of pose files and maps, or for a single file: a PNG of the same name for each.

    python -m tools.make_hints canny photos/ hints/
    python -m tools.make_hints canny bird.jpg hints/
    python -m tools.make_hints canny photos/ hints/ --option low=50 --option high=150 --size 512

Subfolders are included. Existing hints are left alone, so a run that was stopped can be continued. Files that cannot be
read or that the detector fails on are listed at the end, and the exit status is then 1.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from controlnet.common.program import new_parser, note
from controlnet.hints import (
    DETECTORS,
    LEARNED_NOTE,
    NotInstalledError,
    detect_file,
    find_detector,
    options_of,
    options_text,
    parse_detector,
)
from tools.cli import make_folder, run_tool

LISTED_AT_MOST = 20  # bad files, at the end

Failure = tuple[Path, str]  # a file without a hint, and why


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.make_hints", __doc__)
    parser.epilog = detectors_help()
    parser.add_argument("detector", metavar="DETECTOR", help="one of those below")
    parser.add_argument("source", metavar="IN", help="the folder of images, pose files or maps, or one of these files")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder for the hints, created if needed")
    add = parser.add_argument
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the detector, see below; repeatable")
    add("--size", type=int, metavar="N", help="resize images to this short side first, as training will (default: no)")
    add("--replace", action="store_true", help="make existing hints again")
    return run_tool(parser, argv, make_hints)


def detectors_help() -> str:
    lines = ["detectors, and their options with the defaults:"]
    for name, detector in DETECTORS.items():
        options = f" ({options_text(options_of(name))})" if options_of(name) else ""
        lines.append(f"  {name:13} {detector.about}{options}")
    return "\n".join([*lines, "", LEARNED_NOTE])


def make_hints(args: argparse.Namespace) -> int:
    """Makes the missing hints. The exit status is 1 if a file has none in the end."""
    detector, options = parse_detector(":".join([args.detector, *filter(None, [",".join(args.option)])]))
    if args.size is not None and args.size < 64:
        raise ValueError(f"--size is {args.size}, expected at least 64 pixels")
    check_folders(args.source, args.out_dir)
    places, clashes = hint_places(detector, Path(args.source), args.out_dir)
    missing = {place: source for place, source in places.items() if args.replace or not place.exists()}
    from tqdm import tqdm

    from controlnet.common.images import fitted_size, resized, save_png

    def fit(image: Image.Image) -> Image.Image:
        # In the image's own shape, as training resizes it before it crops.
        return resized(image, fitted_size(image, args.size, 1)) if args.size else image

    failures = []
    for place, source in tqdm(missing.items(), unit="hint", disable=None):
        try:
            hint = detect_file(detector, source, fit, **options)
        except NotInstalledError:  # the other files would fail as well
            raise
        except Exception as error:  # whatever the detector cannot do with one image, the others get their hints
            failures.append((source, str(error) or type(error).__name__))
            continue
        save_png(Image.fromarray(hint), place, {})
    print(
        f"{len(missing) - len(failures)} hints made in {args.out_dir}, {len(places) - len(missing)} were there already"
    )
    failures += clashes
    for path, reason in failures[:LISTED_AT_MOST]:
        note(f"no hint for {path}: {reason}")
    if len(failures) > LISTED_AT_MOST:
        note(f"... and for {len(failures) - LISTED_AT_MOST} more")
    return 1 if failures else 0


def check_folders(source: str, out_dir: Path) -> None:
    """Makes OUT_DIR. Raises ValueError if there is nothing to read from or nowhere to write to."""
    path = Path(source)
    if not path.is_dir() and not path.is_file():
        raise ValueError(f'IN is "{source}", expected a folder or a file')
    if path.is_dir() and out_dir.resolve().is_relative_to(path.resolve()):
        raise ValueError(f'OUT_DIR "{out_dir}" is in IN, where hints would be taken for images: choose another')
    make_folder(out_dir, "OUT_DIR")


def hint_places(name: str, source: Path, out_dir: Path) -> tuple[dict[Path, Path], list[Failure]]:
    """-> (hint -> the file it is made from, the files whose hint would have the name of an earlier one's)

    Raises ValueError for a folder without files that the detector reads. A single file may have any name.
    """
    if source.is_file():
        place = out_dir / f"{source.stem}.png"
        if place.resolve() == source.resolve():
            raise ValueError(f'the hint would replace "{source}": choose another OUT_DIR')
        return {place: source}, []
    from controlnet.training.pairs.folders import visible_files

    suffixes = find_detector(name).suffixes
    every = [source / path for path in sorted(visible_files(source))]
    files = [path for path in every if path.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f'there is no file for {name} in "{source}", expected {", ".join(suffixes)}')
    if len(files) < len(every):
        others = ", ".join(sorted({path.suffix for path in every} - {path.suffix for path in files}))
        note(f"{len(every) - len(files)} files of other kinds are left out ({others})")
    places, clashes = {}, []
    for file in files:
        place = out_dir / file.relative_to(source).with_suffix(".png")
        first = places.setdefault(place, file)
        if first != file:
            clashes.append((file, f"its hint would have the same name as that of {first}: rename one of them"))
    return places, clashes


if __name__ == "__main__":
    sys.exit(main())
