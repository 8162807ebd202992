"""Digests of names, contents and captions: data are known by these, not by where they lie or since when.

A run goes on only with the same data; latents are found again by what they were made from.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ENDS = 2**15  # bytes that are read at the end of a large file, and twice as many at its beginning
# An edit changes the length or the end of a compressed image; archives are too large to look for any other.
TOLD_BY_ENDS = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".jp2", ".tar"}


class Key(NamedTuple):
    """Digests of what a sample's latents and text states depend on, besides the base, and of what its hint does."""

    latents: str
    hint: str


class Identity(NamedTuple):
    fingerprint: dict  # of all samples together, by which a run knows its data
    keys: list[Key]  # a sample each


def digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]


def digest_of(values: Iterable) -> str:
    return digest(repr(list(values)).encode())


def digests_of_files(files: Iterable[Path]) -> dict[Path, str]:
    files = list(dict.fromkeys(files))
    with ThreadPoolExecutor() as pool:  # a disk far away answers each late, but many at once
        return dict(zip(files, pool.map(digest_of_file, files), strict=True))


def digest_of_file(file: Path) -> str:
    """Of the whole content; of compressed images and archives, which take as long as an epoch to read, of the length
    and both ends alone. "" if the file cannot be read."""
    try:
        with open(file, "rb") as stream:
            length = stream.seek(0, 2)
            stream.seek(0)
            sha = hashlib.sha256(str(length).encode())
            if file.suffix.lower() in TOLD_BY_ENDS:
                sha.update(stream.read(2 * ENDS))
                stream.seek(max(stream.tell(), length - ENDS))
            return hashlib.file_digest(stream, lambda: sha).hexdigest()[:16]  # of what is left, in blocks
    except OSError:
        return ""


# The entries of a fingerprint that are hashes: it helps nobody to see their values.
DIGESTS = {"base", "UNet", "first image", "file names", "images", "hints", "captions"}


def differences(before: dict, now: dict) -> str:
    """What differs between two fingerprints, in words; "" if nothing does."""
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(key if key in DIGESTS else f"{key}: {now.get(key)} where {before.get(key)} was" for key in keys)
