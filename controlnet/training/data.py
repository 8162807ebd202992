"""Batches for training: the samples at the positions of a run (order.py), bad ones replaced, images encoded or read
from the cache.

All that is random about a sample follows from the seed and its position (objective.py), as its place in the run does.

Shapes: B batch, C channels, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from controlnet.common.images import Size, to_hints, to_images
from controlnet.common.program import height_and_width
from controlnet.inference.sizes import check_size, latent_shape, size_multiple
from controlnet.objective import EncodedPairs, seeded
from controlnet.worlds import Sample
from ldm.checkpoints.files import remove_leftovers
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion

from .distributed import Process
from .framing import framing
from .identity import differences
from .latent_cache import build, check_folder, encode, fingerprint, prepare_folder
from .lock import locked
from .opening import PUBLISHED_FILL50K, Sources, open_sources
from .options import TrainSettings
from .order import Bucketed, Order, Shuffled, batch_positions
from .pairs import BadSample
from .prepare import with_packed_encoders
from .sources import BadSamples, Source, WorldSource, good_samples
from .stored_latents import LatentCache
from .workers import count_of, reading, start_worker

# ------------------------------------------------------------------------------------------------------------ batches


class Images(NamedTuple):
    """Content that is not yet encoded: (B, 3, H, W) in [-1, 1] and B captions."""

    image: Tensor
    caption: list[str]


class Batch(NamedTuple):
    positions: Tensor  # (B,)
    content: Images | EncodedPairs
    hint: Tensor  # (B, C, H, W) in [0, 1]
    bad: Tensor  # (B,): the index of the bad sample that this one replaces, else -1


class Pairs(Dataset):
    """Position -> the pair that stands there (a `Batch` without its first axis); a bad one is replaced by the next.

    `read(index, position)` gives content and hint, or raises BadSample. `number(index)` is the sample's number in the
    source, which for a cache is not its row.
    """

    def __init__(self, read: Callable[[int, int], tuple], order: Order, number: Callable[[int], int] = int):
        self.read, self.order, self.number = read, order, number

    def __getitem__(self, position: int) -> Batch:
        wanted = self.order.at(position)
        tries = [wanted, *self.order.instead(wanted)]
        for index in tries:
            try:
                content, hint = self.read(index, position)
            except BadSample as error:
                problem = error
            else:
                bad = torch.tensor(-1 if index == wanted else self.number(wanted))
                return Batch(torch.tensor(position), content, hint, bad)
        raise BadSample(f"{len(tries)} samples in a row are bad, the last: {problem}")


# ------------------------------------------------------------------------------------------------------ one run's data


def training_size(size: str | None, config: Config) -> Size:
    """--size, or None for the base's own -> (height, width). Raises ValueError if the model cannot make it."""
    if size is None:
        return config.resolution, config.resolution
    picked = height_and_width(size)
    check_size(config, picked)
    return picked


class TrainingData:
    """The samples of a run. Raises ValueError for data that cannot be trained on."""

    def __init__(self, settings: TrainSettings, sd: StableDiffusion, process: Process):
        self.settings, self.process = settings, process
        self.size = training_size(settings.size, sd.config)
        self.latent_shape = latent_shape(sd.config, self.size)
        self.sources = open_sources(settings, self.size, size_multiple(sd.config))
        train = self.sources.train
        self.bad = BadSamples(len(train), self.sources.problems, settings.bad_share, train.name_of)
        self.encoders = with_packed_encoders(sd)
        identity = train.identity()
        self.keys, self.fingerprint = identity.keys, fingerprint(sd, identity, self.size)
        self.check_same_everywhere()
        with torch.no_grad():
            self.empty_prompt = sd.encode_text([""])  # (1, 77, D)
        if process.is_main:
            print(summary(self.sources), *framing(train, size_multiple(sd.config)), sep="\n")
        # Spawned workers get a copy of `read`: not of this object, with its networks.
        self.pairs = Pairs(partial(read_images, train, settings.seed), self.order(range(len(train))))

    def order(self, indices: Sequence[int]) -> Order:
        """The order in which these samples of the source are seen."""
        settings, train = self.settings, self.sources.train
        if settings.buckets:
            return Bucketed([train.size(i) for i in indices], settings.seed, settings.batch_size)
        return Shuffled(len(indices), settings.seed, self.sources.endless)

    def check_same_everywhere(self) -> None:
        """Raises ValueError if another machine has other files under the same names."""
        mains = self.process.from_main(lambda: self.fingerprint)
        if mains != self.fingerprint:
            raise ValueError(
                f"process {self.process.rank} has other data or another base than the main one "
                f"({differences(mains, self.fingerprint)}): give all machines the same files"
            )

    def compute_latents(self) -> None:
        """Encodes the images and captions that the cache lacks: pairs are read from it from now on."""
        train, process, folder = self.sources.train, self.process, self.settings.cache_folder
        check_folder(folder, self.fingerprint)
        builders = process.sharing(folder)
        first = process.rank == builders[0]
        # Of several runs that share a cache one computes at a time, and the next finds what it has made.
        with locked(folder, wait=True) if first else nullcontext():
            if first:
                prepare_folder(folder, self.fingerprint)
                remove_leftovers(folder)
                remove_leftovers(folder / "hints")
            process.barrier()
            workers = 0 if train.uses_network else count_of(self.settings.workers, process.device)
            share = builders.index(process.rank), len(builders)
            build(folder, train, self.keys, self.encoders, self.bad, workers, *share)
            process.barrier()
        cache = LatentCache(folder, train, self.keys)
        self.bad.add(cache.missing())
        self.pairs = Pairs(cache.read, self.order([cache.index(row) for row in range(len(cache))]), cache.index)
        self.encoders = None

    def validation_samples(self) -> list[Sample]:
        return list(good_samples(self.sources.validation))

    def first_samples(self, count: int) -> list[Sample]:
        """The first good ones of those that are trained on."""
        return list(islice(good_samples(self.sources.train), count))

    @property
    def samples_per_step(self) -> int:
        return self.settings.batch_size * self.settings.accumulate * self.process.world_size

    def batches(self, start: int) -> Iterator[Batch]:
        """This process's batches from position `start` on, without end, encoded."""
        device = self.process.device
        positions = batch_positions(start, self.settings.batch_size, self.process.rank, self.process.world_size)
        loader = DataLoader(
            self.pairs,
            batch_sampler=positions,
            num_workers=count_of(self.settings.workers, device),
            pin_memory=device.type == "cuda",
            worker_init_fn=start_worker,
        )
        for batch in reading(loader):
            self.bad.add(batch.bad.tolist())
            if isinstance(batch.content, Images):
                batch = batch._replace(content=encode(self.encoders, *batch.content))
            yield batch


def read_images(source: Source, seed: int, index: int, position: int) -> tuple[Images, Tensor]:
    sample = source.sample(index, seeded(seed, 3, position))
    return Images(to_images([sample.image])[0], sample.caption), to_hints([sample.hint])[0]


def summary(sources: Sources) -> str:
    train, count = sources.train, "endless" if sources.endless else len(sources.train)
    line = f"training on {count} pairs of {train.name}, {len(sources.validation)} for validation"
    if not isinstance(train, WorldSource):
        return f"{sources.about}\n{line}"
    published = f" (the published one is not in {PUBLISHED_FILL50K})" if train.name == "fill50k" else ""
    return f"{line}: a synthetic dataset, drawn here{published}"
