"""From pictures to training batches: sources of samples, one transform for picture and hint, and all that is random.

Position p is the p-th sample that a run looks at, counted over all processes, accumulated batches and epochs. Which
sample that is, its noise, its timestep, its crop and whether its prompt is dropped follow from (seed, p) alone. So a
resumed run needs to know nothing but p, and batches can be cut into any parts.

Shapes: B batch, C channels, H W pixels, h = H/8, w = W/8. Pictures are uint8 arrays (H, W, C).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from controlnet.common.images import Size, resized, to_hints, to_images
from controlnet.hints import detect, find_detector, parse_options
from controlnet.worlds import WORLDS, Sample
from ldm.stable_diffusion import StableDiffusion

from .folders import BadSample, Entry, check_same_shape, list_folder, read_hint, read_picture

PUBLISHED_FILL50K = Path("data/fill50k")
WORLD_PICTURES = 2000  # of a world, which is endless, when nobody says how many
HELD_OUT_SHARE, HELD_OUT_MOST = 20, 32  # one in twenty of a folder, at most 32


# ------------------------------------------------------------------------------------------------------- transform


@dataclass(frozen=True)
class Transform:
    """To `size`: resized to cover it, cropped in the middle or at random, perhaps mirrored. Picture and hint alike."""

    size: Size
    random_crop: bool = False
    flip: bool = False

    def __call__(
        self, image: np.ndarray, hint: np.ndarray, generator: torch.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Without a generator nothing is random: the crop is in the middle, and nothing is mirrored."""
        height, width = self.size
        scale = max(height / image.shape[0], width / image.shape[1])
        covering = max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale))
        slack = covering[0] - height, covering[1] - width
        top, left = slack[0] // 2, slack[1] // 2
        if self.random_crop and generator is not None:
            top, left = (int(torch.randint(s + 1, (), generator=generator)) for s in slack)
        mirrored = self.flip and generator is not None and bool(torch.rand((), generator=generator) < 0.5)

        def place(picture: np.ndarray) -> np.ndarray:
            picture = resized_array(picture, covering)[top : top + height, left : left + width]
            return np.ascontiguousarray(picture[:, ::-1] if mirrored else picture)

        return place(image), place(hint)


def resized_array(picture: np.ndarray, size: Size) -> np.ndarray:
    """(H, W, C) for any C: channel by channel, as none may be taken for a transparency that weighs the others."""
    if picture.shape[:2] == size:
        return picture
    if picture.shape[2] == 3:
        return np.array(resized(Image.fromarray(picture), size))
    channels = [resized(Image.fromarray(picture[..., i]), size) for i in range(picture.shape[2])]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


# --------------------------------------------------------------------------------------------------------- sources


class Source(Protocol):
    """Samples by index. `hints_are_files`: a hint is read again as easily as from a cache."""

    name: str
    hints_are_files: bool

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample: ...

    def hint(self, index: int) -> np.ndarray: ...

    def fingerprint(self) -> dict: ...


class WorldSource:
    """The first `length` samples of a procedural world."""

    hints_are_files = False

    def __init__(self, name: str, size: Size, length: int, seed: int = 0, held_out: bool = False):
        if size[0] != size[1]:
            raise ValueError(f"the world {name} draws squares, and the size is {size[1]}x{size[0]}: give one side")
        self.name, self.length, self.held_out = name, length, held_out
        self.seed = 0 if held_out else seed  # what is held out is the same for every run
        self.world = WORLDS[name](size[0], self.seed, held_out=held_out)

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample:
        return self.world[index]

    def hint(self, index: int) -> np.ndarray:
        return self.world[index].hint

    def fingerprint(self) -> dict:
        """The first picture stands for the world's code."""
        first = self.world[0]
        pixels = digest(first.image.tobytes(), first.hint.tobytes(), first.caption.encode())
        return {"world": self.name, "seed": self.seed, "held out": self.held_out, "first picture": pixels}


class FolderSource:
    """Pairs on disk, with hints from files or, with `detect`, made from the pictures."""

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        transform: Transform,
        hint_channels: int = 3,
        detect: str | None = None,
    ):
        self.name, self.entries, self.transform = name, entries, transform
        self.hint_channels, self.detect = hint_channels, detect
        self.hints_are_files = detect is None
        self.make_hint = None if detect is None else photograph_detector(detect)

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """Raises BadSample."""
        entry = self.entries[index]
        image = read_picture(entry.image)
        if self.make_hint is None:
            hint = read_hint(entry.hint, self.hint_channels)
            check_same_shape(image, hint, entry)
            image, hint = self.transform(image, hint, generator)
        else:  # on the picture as the model sees it: edges are a pixel wide at its size
            image, _ = self.transform(image, image, generator)
            hint = self.make_hint(image)
        return Sample(image, hint, entry.caption)

    def hint(self, index: int) -> np.ndarray:
        """The hint of `sample` without randomness. Raises BadSample."""
        if self.make_hint is not None:
            return self.sample(index).hint
        hint = read_hint(self.entries[index].hint, self.hint_channels)
        return self.transform(hint, hint)[1]

    def fingerprint(self) -> dict:
        """By names, sizes and times of the files: reading all of them would take as long as an epoch."""
        files = [(str(e.image), *stat(e.image), str(e.hint), *stat(e.hint), e.caption) for e in self.entries]
        return {"folder": digest(repr(files).encode()), "detect": self.detect, "hint channels": self.hint_channels}


def photograph_detector(text: str) -> Callable[[np.ndarray], np.ndarray]:
    """ "canny" or "canny:low=50": picture -> hint, both uint8 (H, W, 3). Raises ValueError for what makes none."""
    name, _, options = text.partition(":")
    if not find_detector(name).works_on_photographs:
        raise ValueError(f'"{name}" makes no hints from pictures, but from files of its own: take another --detect')
    return partial(detect, name, **parse_options(name, options.split(",") if options else []))


def stat(path: Path | None) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, AttributeError):
        return (0, 0)
    return status.st_size, status.st_mtime_ns


def digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]


@dataclass(frozen=True)
class Sources:
    """What to train on and what is held out from it, with the problems that were found by the way."""

    train: Source
    held_out: Source
    problems: list[str]


def open_sources(
    data: str,
    transform: Transform,
    pictures: int | None,
    seed: int,
    held_out: int | None = None,
    hint_channels: int = 3,
    detect: str | None = None,
) -> Sources:
    """`data` is a world's name or a folder; `pictures` limits how many are used, `held_out` says how many are not
    trained on (None: see HELD_OUT_SHARE). The split depends on the data alone, so it is the same for every run.

    Raises ValueError for what is no data, or too little to hold anything out.
    """
    folder = PUBLISHED_FILL50K if data == "fill50k" and (PUBLISHED_FILL50K / "prompt.json").exists() else Path(data)
    if data in WORLDS and folder == Path(data) and not folder.is_dir():
        if detect or hint_channels != 3:
            raise ValueError(f"the world {data} draws its own hints of 3 channels: leave out --detect, --hint-channels")
        count = HELD_OUT_MOST if held_out is None else held_out
        size = transform.size
        train = WorldSource(data, size, pictures or WORLD_PICTURES, seed)
        return Sources(train, WorldSource(data, size, count, held_out=True), [])
    if not folder.exists() and "/" not in data:
        raise ValueError(f'there is no folder "{data}", and the worlds are {", ".join(WORLDS)}: give one of them')
    if detect and hint_channels != 3:
        raise ValueError(f"--detect makes hints of 3 channels, and --hint-channels is {hint_channels}: leave out one")
    listing = list_folder(folder, need_hints=detect is None)
    train, rest = split(listing.entries, held_out)
    fixed = Transform(transform.size)
    return Sources(
        FolderSource(str(folder), train[:pictures], transform, hint_channels, detect),
        FolderSource(str(folder), rest, fixed, hint_channels, detect),
        listing.problems,
    )


def split(entries: list[Entry], held_out: int | None) -> tuple[list[Entry], list[Entry]]:
    """-> (train, held out), always the same for the same list. Raises ValueError if nothing is left to train on."""
    count = min(max(1, len(entries) // HELD_OUT_SHARE), HELD_OUT_MOST) if held_out is None else held_out
    if count >= len(entries):
        raise ValueError(
            f"there are {len(entries)} usable pairs, expected more than the {count} that are held out: "
            "add some, or give another number as --held-out"
        )
    chosen = set(torch.randperm(len(entries), generator=seeded(0))[:count].tolist())
    return [e for i, e in enumerate(entries) if i not in chosen], [entries[i] for i in sorted(chosen)]


# ----------------------------------------------------------------------------------------------------------- draws


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator of its own for, say, (seed, step): a resumed run then draws what an uninterrupted one would."""
    sequence = np.random.SeedSequence(numbers)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


class Draw(NamedTuple):
    """What is random in one sample's part of the loss; in batches each with a first axis B."""

    noise: Tensor  # (4, h, w), the epsilon of Eq. 5
    t: Tensor  # (), a whole timestep
    posterior_noise: Tensor  # (4, h, w), for a sample of the autoencoder's posterior
    dropped: Tensor  # (), bool: the prompt is empty


def draw(latent_shape: tuple[int, ...], timesteps: int, prompt_dropout: float, generator: torch.Generator) -> Draw:
    """Half of the prompts are dropped in ControlNet's training (section 3.3), so that it learns to read the hint's
    meaning without one."""
    return Draw(
        torch.randn(latent_shape, generator=generator),
        torch.randint(timesteps, (), generator=generator),
        torch.randn(latent_shape, generator=generator),
        torch.rand((), generator=generator) < prompt_dropout,
    )


class Order:
    """Which sample stands at a position: each epoch has all of `length` in a new order; None is endless."""

    def __init__(self, length: int | None, seed: int):
        self.length, self.seed = length, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # a batch may lie across two

    def _epoch(self, epoch: int) -> Tensor:
        return torch.randperm(self.length, generator=seeded(self.seed, 1, epoch))

    def __getitem__(self, position: int) -> int:
        if self.length is None:
            return position
        epoch, place = divmod(position, self.length)
        return int(self.epoch(epoch)[place])


def positions(start: int, batch_size: int, process: int = 0, processes: int = 1) -> Iterator[range]:
    """The batches of one process from position `start` on: the processes take turns."""
    for turn in count():
        first = start + (turn * processes + process) * batch_size
        yield range(first, first + batch_size)


# --------------------------------------------------------------------------------------------------------- batches


class Picture(NamedTuple):
    """Content that is still to be encoded; in batches (B, 3, H, W) in [-1, 1] and B captions."""

    image: Tensor
    caption: str


class Latents(NamedTuple):
    """Encoded content: the posterior's moments (4, h, w), unscaled, and the text states (77, D); in batches (B, ..)."""

    mean: Tensor
    logvar: Tensor
    context: Tensor


class Batch(NamedTuple):
    content: Picture | Latents
    hint: Tensor  # (B, C, H, W) in [0, 1]
    draw: Draw
    bad: Tensor  # (B,), the index of a bad sample that this one stands in for, else -1


@dataclass(frozen=True)
class Draws:
    """How `draw` is called at each position."""

    latent_shape: tuple[int, ...]
    timesteps: int
    prompt_dropout: float
    seed: int

    def __call__(self, position: int) -> Draw:
        return draw(self.latent_shape, self.timesteps, self.prompt_dropout, seeded(self.seed, 2, position))


class LivePairs(Dataset):
    """Position -> Batch of one, its picture read (or drawn), transformed at random, and not yet encoded."""

    def __init__(self, source: Source, draws: Draws, order: Order):
        self.source, self.draws, self.order = source, draws, order

    def __getitem__(self, position: int) -> Batch:
        wanted = self.order[position]
        generator = seeded(self.draws.seed, 3, position)
        index, sample = first_good(lambda i: self.source.sample(i, generator), wanted, len(self.source))
        picture = Picture(to_images([sample.image])[0], sample.caption)
        return Batch(picture, to_hints([sample.hint])[0], self.draws(position), bad_index(wanted, index))


def first_good(read, wanted: int, length: int):
    """-> (index, read(index)) for the first good sample from `wanted` on: who stands in depends on nothing else."""
    for step in range(min(length, 100)):
        index = (wanted + step) % length if step else wanted
        try:
            return index, read(index)
        except BadSample as error:
            last = error
    raise BadSample(f"100 samples in a row are bad, the last: {last}")


def bad_index(wanted: int, index: int) -> Tensor:
    return torch.tensor(wanted if index != wanted else -1)


class BadSamples:
    """Counts those that were met, and stops the run where they are too many."""

    def __init__(self, total: int, problems: Sequence[str], share: float):
        self.total, self.share = total + len(problems), share
        self.lines, self.indices = len(problems), set()
        self.check(problems[0] if problems else "")

    def __len__(self) -> int:
        return self.lines + len(self.indices)

    def add(self, bad: Tensor) -> None:
        """`Batch.bad`. Raises ValueError if too many are bad by now."""
        new = {index for index in bad.tolist() if index >= 0} - self.indices
        if new:
            self.indices |= new
            self.check(f"number {min(new)}")

    def check(self, example: str) -> None:
        if len(self) > self.share * self.total:
            raise ValueError(
                f"{len(self)} of {self.total} samples are bad (for example {example}), more than the share of "
                f"{self.share:g} that --bad-share allows: see `python -m tools.check_data`"
            )


# ------------------------------------------------------------------------------------ for training the base itself


class LatentPairs:
    """The first `length` samples of a world as latents (length, 4, h, w), computed here, once, and captions.

    The posterior's mean stands for a sample of it: its deviation is some thousandths of the latents' own.
    """

    def __init__(self, samples: Sequence[Sample], length: int, sd: StableDiffusion, chunk: int = 32):
        self.captions, latents = [], []
        for start in tqdm(range(0, length, chunk), desc="latents", mininterval=5):
            drawn = [samples[i] for i in range(start, min(start + chunk, length))]
            self.captions += [sample.caption for sample in drawn]
            with torch.no_grad():
                latents.append(sd.encode(to_images(sample.image for sample in drawn), sample=False).float().cpu())
        self.latents = torch.cat(latents)

    def draw(self, size: int, generator: torch.Generator) -> list[int]:
        """Random indices, with replacement: step k of a run needs no memory of the steps before it."""
        return torch.randint(len(self.latents), (size,), generator=generator).tolist()


def drop_prompts(captions: list[str], share: float, generator: torch.Generator) -> list[str]:
    """Each caption replaced by "" with probability `share`, a tenth in the base's training: classifier-free guidance
    needs a model that also knows no prompt."""
    dropped = torch.rand(len(captions), generator=generator) < share
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
