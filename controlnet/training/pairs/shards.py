"""Tar archives as webdataset writes them: files whose names are equal up to the first dot, one after another, are a
pair (0001.jpg 0001.hint.png 0001.txt)."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from controlnet.common.files import parse_json

from .entries import BadSample, Entry, Listing, Wanted
from .names import ARRAYS, HIDDEN, PICTURES, TEXTS, role_of
from .tables import text_in
from .text import decoded

CAPTIONS = {*TEXTS, ".text", ".prompt", ".json"}


class Member(NamedTuple):
    name: str
    offset: int
    size: int


class Packed(NamedTuple):
    image: Member
    hint: Member | None
    captions: list[Member]  # the first with a text in it is the pair's


def list_shards(folder: Path, wanted: Wanted) -> Listing | None:
    """The archives at the top or under train/, unopened; None if there are none."""
    if folder.is_file():
        return Listing("a tar shard", shards=[folder])
    for root in (folder, folder / "train"):
        found = sorted(path for path in root.glob("*") if path.name.endswith((".tar", ".tar.gz", ".tgz")))
        if found:
            return Listing("tar shards", shards=found)
    return None


@lru_cache(maxsize=4)  # an epoch takes one archive after the other
def pairs_in(shard: Path) -> tuple[Packed, ...]:
    """The pairs in an archive, by its headers alone. Raises ValueError if it is damaged, compressed or not one."""
    groups: dict[str, list[Member]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                path = Path(info.name)
                if info.isfile() and "." in path.name and not any(map(HIDDEN.match, path.parts)):
                    key = str(path.with_name(path.name.split(".")[0]))
                    groups.setdefault(key, []).append(Member(info.name, info.offset_data, info.size))
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f'"{shard}" is not readable as a tar archive ({error}): give a whole one, unzipped') from error
    return tuple(pair for group in groups.values() if (pair := packed(group)))


def packed(group: list[Member]) -> Packed | None:
    """None for a group without an image."""
    found: dict[str, list[Member]] = {"image": [], "hint": [], "caption": []}
    for member in sorted(group, key=lambda member: member.name.endswith(".json")):  # captions proper come first
        _, *words, suffix = Path(member.name).name.lower().split(".")
        role = next(filter(None, map(role_of, words)), "caption" if f".{suffix}" in CAPTIONS else "image")
        if f".{suffix}" in {"image": PICTURES, "hint": PICTURES | ARRAYS, "caption": CAPTIONS}[role]:
            found[role].append(member)
    images, hints, captions = found.values()
    return Packed(images[0], hints[0] if hints else None, captions) if images else None


@contextmanager
def unpacked(shard: Path, pair: Packed, wanted: Wanted) -> Iterator[Entry]:
    """The pair in files of its own, while it is read. Raises BadSample, which names the archive."""
    with TemporaryDirectory() as folder:

        def unpack(member: Member, name: str) -> Path:
            path = Path(folder, name + Path(member.name).suffix)
            path.write_bytes(read(shard, member))
            return path

        where = f"{shard}/{pair.image.name}"
        if wanted.hints and pair.hint is None:
            raise BadSample(f"{where} has no hint: expected one of its name with .hint.png (or add --detect)")
        caption = wanted.caption(caption_in(shard, pair, wanted), f"{where} has no caption in .txt or .json")
        image, hint = unpack(pair.image, "image"), unpack(pair.hint, "hint") if wanted.hints else None
        try:
            yield Entry(image, hint, caption)
        except BadSample as error:
            text = str(error).replace(str(image), where)
            text = text.replace(str(hint), f"{shard}/{pair.hint.name}") if hint else text
            raise BadSample(text) from error


def read(shard: Path, member: Member) -> bytes:
    with open(shard, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def caption_in(shard: Path, pair: Packed, wanted: Wanted) -> str:
    """ "" for none. Raises BadSample."""
    texts = (caption_of(shard, member) for member in pair.captions if wanted.prompt is None)
    return next((text for text in texts if text.strip()), "")


def caption_of(shard: Path, member: Member) -> str:
    try:
        text = decoded(read(shard, member), f"{shard}/{member.name}")
        if not member.name.endswith(".json"):
            return text
        values = parse_json(text)
        return text_in(values, "caption") if isinstance(values, dict) else ""
    except ValueError as error:
        raise BadSample(str(error)) from error
