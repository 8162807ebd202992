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
    caption: Member | None


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
    """The pairs in an archive, by its headers alone. Raises ValueError if it is damaged, compressed or no archive."""
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
    found: dict[str, Member] = {}
    for member in sorted(group, key=lambda member: member.name.endswith(".json")):  # captions proper come first
        _, *words, suffix = Path(member.name).name.lower().split(".")
        role = next(filter(None, map(role_of, words)), "caption" if f".{suffix}" in CAPTIONS else "image")
        if f".{suffix}" in {"image": PICTURES, "hint": PICTURES | ARRAYS, "caption": CAPTIONS}[role]:
            found.setdefault(role, member)
    return Packed(found["image"], found.get("hint"), found.get("caption")) if "image" in found else None


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
    if pair.caption is None or wanted.prompt is not None:
        return ""
    try:
        text = decoded(read(shard, pair.caption), f"{shard}/{pair.caption.name}")
        if not pair.caption.name.endswith(".json"):
            return text
        values = parse_json(text)
        return text_in(values, "caption") if isinstance(values, dict) else ""
    except ValueError as error:
        raise BadSample(str(error)) from error
