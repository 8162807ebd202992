"""Pairs of images and hints on disk, in the layouts that people have them in. Files are found and text is read here; no
image is opened."""

from pathlib import Path

from .entries import BadSample, Entry, Listing, Wanted
from .folders import list_folders
from .shards import list_shards
from .tables import READERS, STEMS, list_table

__all__ = ["BadSample", "Entry", "Listing", "Wanted", "recognise"]

# Each gives None for a folder that is laid out in another way. The first that fits is taken.
LAYOUTS = (
    list_table,  # prompt.json, metadata.jsonl, .csv, .parquet
    list_folders,  # images/ hints/ captions/, sd-scripts' folders, images with .txt, photographs
    list_shards,  # 000000.tar, as webdataset writes them
)


def recognise(folder: Path, wanted: Wanted) -> Listing:
    """The pairs in a folder or a tar file. Raises ValueError if it is neither, has no known layout, or is empty."""
    if not folder.is_dir() and not (folder.is_file() and folder.suffix == ".tar"):
        found = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f'"{folder}" {found}: give a folder of pairs')
    listing = next((found for layout in LAYOUTS if (found := layout(folder, wanted))), None)
    if listing is None:
        raise ValueError(
            f'"{folder}" has no layout that is known: expected {STEMS[0]}.json, metadata{", ".join(READERS)}, the '
            "folders images/, hints/ and captions/, or .tar files in it"
        )
    if not listing.entries and not listing.shards:
        problems = "; ".join(listing.problems[:3]) or "it lists none"
        raise ValueError(f'"{folder}" holds no pair to train on: {problems}')
    return listing
