"""Opens what --data names: the pairs that a run trains on, and those that it is validated on."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from controlnet.common.images import Size
from controlnet.common.program import flag_of, printable
from controlnet.hints.hint_file import is_label_map
from controlnet.objective import seeded
from controlnet.worlds import WORLDS

from .options import TrainSettings
from .pair_files import read_hint
from .pairs import BadSample, Entry, Listing, Wanted, recognise
from .recipes import BEFORE_AS_HINTS
from .shard_source import Shard, ShardSource, ShardStream
from .sources import FolderSource, Source, WorldSource
from .transform import Transform, bucket_sizes

PUBLISHED_FILL50K = Path("data/fill50k")
WORLD_IMAGES = 2000  # of a synthetic dataset, which is endless, when nobody says how many
VALIDATION_SHARE, VALIDATION_MOST = 20, 32  # one in twenty of a folder, at most 32
LOOKED_AT = 16  # hints, before a training
OF_FOLDERS = ("buckets", "flip", "hint_channels", "label_maps", "prompt", "random_crop")  # settings that no world has


@dataclass(frozen=True)
class Sources:
    """What to train on, the validation pairs, and a sentence for each problem that was found on the way.

    An endless source has a sample for every position of a run, whose order is its own.
    """

    train: Source
    validation: Source
    problems: list[str]
    about: str = ""  # what was found, in a line
    endless: bool = False


def open_sources(settings: TrainSettings, size: Size, multiple: int = 64) -> Sources:
    """Opens what `settings.data` names. The split depends on the data alone, so it is the same for every run.

    The sides of aspect buckets are multiples of `multiple`; validation pairs all have `size`, to be compared.

    Raises ValueError if this is not a dataset or too small to split, and for settings that contradict each other.
    """
    data, detect, channels = settings.data, settings.detect, settings.hint_channels
    folder = PUBLISHED_FILL50K if data == "fill50k" and (PUBLISHED_FILL50K / "prompt.json").exists() else Path(data)
    if data in WORLDS and folder == Path(data) and not folder.is_dir():
        return open_world(settings, size)
    if (settings.random_crop or settings.flip) and not settings.no_cache:
        raise ValueError(
            "latents are computed once, and --random-crop and --flip change the image each time: add --no-cache"
        )
    if not folder.exists() and "/" not in data:
        raise ValueError(
            f'there is no folder "{data}", and the synthetic datasets are {", ".join(WORLDS)}: give one of them'
        )
    if detect and channels != 3:
        raise ValueError(f"--detect makes hints of 3 channels, and --hint-channels is {channels}: leave out one")
    wanted = Wanted(detect is None, settings.prompt_dropout < 1, settings.prompt)
    if settings.recipe == "ip2p":
        wanted = replace(wanted, without_hints=BEFORE_AS_HINTS)
    listing = recognise(folder, wanted)
    if listing.shards:
        return open_shards(settings, folder, listing.shards, wanted, size)
    return open_folder(settings, folder, listing, size, multiple)


def open_folder(settings: TrainSettings, folder: Path, listing: Listing, size: Size, multiple: int) -> Sources:
    source = partial(FolderSource, str(folder), hint_channels=settings.hint_channels, detect=settings.detect)
    unusable = f" and {len(listing.problems)} others ({listing.problems[0]})" if listing.problems else ""
    train, validation = split(listing.entries, settings.validation, unusable)
    train = [entry for entry in train[: settings.images] for _ in range(entry.repeats)]
    buckets = bucket_sizes(size, multiple) if settings.buckets else ()
    transform = Transform(size, settings.random_crop, settings.flip, buckets)
    trained_on = source(entries=train, transform=transform)
    if not settings.label_maps:
        check_no_label_maps(trained_on)
    held_out = source(entries=validation, transform=Transform(size))
    about = printable(f"{folder} is read as {listing.summary(settings.prompt)}")
    return Sources(trained_on, held_out, listing.problems, about)


def check_no_label_maps(source: FolderSource) -> None:
    """Raises ValueError if most of a few hints look like label maps."""
    files = [entry.hint for entry in source.entries[:: 1 + len(source) // LOOKED_AT] if entry.hint is not None]
    found = []
    for file in files:
        with suppress(BadSample):
            if is_label_map(read_hint(file, source.hint_channels)):
                found.append(file)
    if 2 * len(found) > len(files):
        raise ValueError(
            f'"{found[0]}" looks like a label map, whose numbers 0, 1, 2 ... are black as colours: colour it with '
            "`python -m tools.make_hints segmentation`, or add --label-maps to train on the numbers as they are"
        )


def open_world(settings: TrainSettings, size: Size) -> Sources:
    data = settings.data
    found = [flag_of(name) for name in OF_FOLDERS if getattr(settings, name) != getattr(TrainSettings, name)]
    if found:
        raise ValueError(
            f"the synthetic dataset {data} draws square images with hints of 3 channels, and their captions: leave out "
            f"{', '.join(found)}"
        )
    count = VALIDATION_MOST if settings.validation is None else settings.validation
    train = WorldSource(data, size, settings.images or WORLD_IMAGES, settings.seed, detect=settings.detect)
    held_out = WorldSource(data, size, count, held_out=True, detect=settings.detect)
    return Sources(train, held_out, [], endless=settings.no_cache and settings.images is None)


def open_shards(settings: TrainSettings, folder: Path, paths: list[Path], wanted: Wanted, size: Size) -> Sources:
    """The validation pairs are the first of the first archive, so that no other needs to be opened for them."""
    if settings.buckets:
        raise ValueError("the images of tar shards are not looked at beforehand: leave out --buckets, or unpack them")
    if settings.hint_channels != 3 and not settings.no_cache:
        raise ValueError(
            f"hints of tar shards are cached as images of 3 channels, and --hint-channels is "
            f"{settings.hint_channels}: add --no-cache"
        )
    count = validation_count(len(Shard(paths[0])), settings.validation, f" in {paths[0]}")
    shards = first_of([Shard(paths[0], count), *map(Shard, paths[1:])], settings.images)
    files = partial(FolderSource, str(folder), [], hint_channels=settings.hint_channels, detect=settings.detect)
    trained_on = shards, wanted, files(Transform(size, settings.random_crop, settings.flip))
    train = ShardStream(*trained_on, settings.seed) if settings.no_cache else ShardSource(*trained_on)
    validation = ShardSource([Shard(paths[0], 0, count)], wanted, files(Transform(size)))
    about = f"{folder} is read as tar shards: {len(shards)}, the first with {len(shards[0])} pairs for training"
    return Sources(train, validation, [], about, endless=settings.no_cache)


def first_of(shards: list[Shard], count: int | None) -> list[Shard]:
    """The first `count` pairs; archives behind them are not even opened."""
    if count is None:
        return shards
    kept = []
    for shard in shards:
        kept.append(replace(shard, stop=shard.start + min(count, len(shard))))
        count -= len(kept[-1])
        if count <= 0:
            break
    return kept


def split(entries: list[Entry], validation: int | None, others: str = "") -> tuple[list[Entry], list[Entry]]:
    """-> (train, validation), always the same for the same list. Raises ValueError if nothing is left to train on,
    which tells of the `others`."""
    count = validation_count(len(entries), validation, others)
    chosen = set(torch.randperm(len(entries), generator=seeded(0))[:count].tolist())
    return [e for i, e in enumerate(entries) if i not in chosen], [entries[i] for i in sorted(chosen)]


def validation_count(pairs: int, wanted: int | None, others: str) -> int:
    """Raises ValueError if nothing is left to train on."""
    count = min(max(1, pairs // VALIDATION_SHARE), VALIDATION_MOST) if wanted is None else wanted
    if count >= pairs:
        raise ValueError(
            f"usable pairs{others}: {pairs}, expected more than the {count} for validation: add some, or give another "
            "number as --validation"
        )
    return count
