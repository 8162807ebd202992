"""What is wrong with a folder of pairs, or odd enough to be looked at: findings with their files and what to do.

Nothing here changes what a training does with the data.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from controlnet.hints.hint_file import is_label_map
from controlnet.hints.hint_image import in_rgb
from controlnet.inference.hint_kind import fewer, is_flat, is_inverted
from ldm.config import PRESETS
from ldm.tokenizer import Tokenizer

from .identity import digests_of_files
from .opening import split
from .pair_files import check_same_shape, read_hint, read_pixels
from .pairs import BadSample, Entry
from .pairs.folders import visible_files
from .pairs.names import ARRAYS, PICTURES
from .sources import FolderSource

REPLACED = "\ufffd"  # what a decoder puts in place of bytes that it does not know


@dataclass(frozen=True)
class Finding:
    what: str  # in the plural
    files: list[str]
    todo: str


# ------------------------------------------------------------------------------------------------- one pair at a time

# What a hint looks like, of the first that applies, and what to do about it. Hints are uint8 (H, W, C).
ODD_HINTS: dict[str, tuple[Callable[[np.ndarray], bool], str]] = {
    "hints that look like label maps": (
        is_label_map,
        "their numbers 0, 1, 2 ... are black as colours: colour them with `python -m tools.make_hints segmentation`, "
        "or train with --label-maps",
    ),
    "black hints": (
        lambda hint: hint.max() <= 24,
        "nothing was found in the image: make them again with lower thresholds, or leave the pairs out",
    ),
    "hints of one colour": (
        lambda hint: is_flat(in_rgb(hint)),
        "nothing can be learned from them: make them again, or leave the pairs out",
    ),
    "dark lines on white": (
        lambda hint: is_inverted(fewer(in_rgb(hint))),
        "published ControlNets read light lines on black: `python -m tools.make_hints invert` turns them",
    ),
}


def look_at_pairs(source: FolderSource) -> tuple[list[str], list[Finding]]:
    """-> a sentence for each pair that cannot be used, and what is odd about the hints of the others."""

    def look(i: int) -> tuple[str | None, str | None]:
        """Why it cannot be used, and what is odd about its hint."""
        try:
            hint = hint_of(source, i)
        except BadSample as error:
            return str(error), None
        return None, next((what for what, (applies, _) in ODD_HINTS.items() if applies(hint)), None)

    with ThreadPoolExecutor() as pool:
        looks = list(tqdm(pool.map(look, range(len(source))), "pairs", len(source), disable=None))
    files = defaultdict(list)
    for entry, (_, odd) in zip(source.entries, looks, strict=True):
        files[odd].append(str(entry.hint or entry.image))
    found = [Finding(what, files[what], todo) for what, (_, todo) in ODD_HINTS.items() if files[what]]
    return [problem for problem, _ in looks if problem], found


def hint_of(source: FolderSource, i: int) -> np.ndarray:
    """The hint as it is stored: resizing would thin its lines. Raises BadSample if image or hint cannot be used."""
    entry = source.entries[i]
    if entry.hint is None:
        return in_rgb(source.sample(i).hint)
    hint = read_hint(entry.hint, source.hint_channels)
    check_same_shape(read_pixels(entry.image).shape[:2], hint, entry)
    return hint


# ---------------------------------------------------------------------------------------------------------- all of them


def look_at_folder(folder: Path, entries: Sequence[Entry]) -> Iterator[Finding]:
    """What only shows where pairs are compared with each other, with their captions and with what is in the folder."""
    yield from twice(entries)
    stems = defaultdict(set)
    for entry in entries:
        stems[entry.hint or entry.image.with_suffix("")].add(entry.image)
    clashing = [" and ".join(map(str, sorted(images))) for images in stems.values() if len(images) > 1]
    yield Finding(
        "images that share a hint", clashing, "their names differ in the ending alone: rename one, and its hint"
    )
    yield from captions(entries)
    used = {file.resolve() for entry in entries for file in (entry.image, entry.hint) if file is not None}
    others = (folder / file for file in sorted(visible_files(folder)))
    left = [str(file) for file in others if file.suffix.lower() in PICTURES | ARRAYS and file.resolve() not in used]
    yield Finding(
        "pictures that are in no pair", left, "they are left out: give them their image, hint or line, or remove them"
    )


def twice(entries: Sequence[Entry]) -> Iterator[Finding]:
    """The same image in two pairs, by its contents; worse if one of them is for validation."""
    contents = digests_of_files(entry.image for entry in entries)
    same = defaultdict(list)
    for entry in entries:
        if contents[entry.image]:
            same[contents[entry.image]].append(entry)
    again = [group for group in same.values() if len(group) > 1]
    names = [" and ".join(str(entry.image) for entry in group) for group in again]
    yield Finding(
        "images that are there more than once", names, "remove all but one, unless their hints differ on purpose"
    )
    try:
        trained_on, validation = split(list(entries), None)
    except ValueError:  # too few to split
        return
    known = {contents[entry.image] for entry in trained_on}
    both = [str(entry.image) for entry in validation if contents[entry.image] in known - {""}]
    yield Finding(
        "validation images that are also trained on",
        both,
        "the validation loss says less than it should: remove the copies",
    )


def captions(entries: Sequence[Entry]) -> Iterator[Finding]:
    config = PRESETS["sd15"].text
    tokenizer = Tokenizer(config)
    lengths = {entry.image: len(tokenizer.encode(entry.caption)) for entry in entries}
    long = [f"{image} ({length})" for image, length in lengths.items() if length > config.positions - 2]
    yield Finding(
        f"captions of more than {config.positions} tokens, with start and end",
        long,
        "the rest is cut off: shorten them, or put what counts first",
    )
    garbled = [f'{entry.image} ("{entry.caption:.40}")' for entry in entries if is_garbled(entry.caption)]
    yield Finding("captions in another encoding than UTF-8", garbled, "save the file with the captions as UTF-8")


def is_garbled(caption: str) -> bool:
    """Bytes that were not UTF-8, or UTF-8 that was read as Windows-1252: "cafÃ©"."""
    if REPLACED in caption:
        return True
    try:
        return caption.encode("cp1252").decode("utf-8") != caption
    except UnicodeError:
        return False
