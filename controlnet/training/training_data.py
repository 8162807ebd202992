"""The data of one run, put together: batches from any position on, and what is shown of the held-out pairs."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from controlnet.common.images import Size
from controlnet.inference.generate import check_size
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion

from .data import (
    PUBLISHED_FILL50K,
    BadSamples,
    Batch,
    Draws,
    LivePairs,
    Order,
    Sources,
    Transform,
    WorldSource,
    open_sources,
    positions,
)
from .distributed import Processes
from .latent_cache import CachedPairs, LatentCache, build, fingerprint, loss_inputs, prepare
from .preview import HeldOutLoss, Preview, good_samples


@dataclass(frozen=True)
class DataSettings:
    """The settings of train.py that concern the data, by the names of its flags."""

    data: str
    pictures: int | None
    size: str | None
    detect: str | None
    hint_channels: int
    random_crop: bool
    flip: bool
    held_out: int | None
    prompt_dropout: float
    bad_share: float
    no_cache: bool
    workers: int | None
    batch_size: int
    accumulate: int
    sample_count: int
    seed: int

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "DataSettings":
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def picture_size(size: str | None, config: Config) -> Size:
    """A side "512" or "512x768", width first, or None for the base's own -> (height, width).

    Raises ValueError if the model cannot make it.
    """
    if size is None:
        return config.resolution, config.resolution
    sides = size.lower().split("x")
    picked = int(sides[-1]), int(sides[0])
    check_size(config, picked)
    return picked


def open_settings(settings: DataSettings, size: Size) -> Sources:
    """Raises ValueError for what is no data, and for settings that contradict each other."""
    if (settings.random_crop or settings.flip) and not settings.no_cache:
        raise ValueError(
            "latents are computed once, and --random-crop and --flip change the picture each time: add --no-cache"
        )
    transform = Transform(size, settings.random_crop, settings.flip)
    return open_sources(
        settings.data,
        transform,
        settings.pictures,
        settings.seed,
        settings.held_out,
        settings.hint_channels,
        settings.detect,
    )


class TrainingData:
    """Raises ValueError for data that cannot be trained on. With a cache in `folder` all latents are there when this is
    made; None encodes at each step."""

    def __init__(self, settings: DataSettings, sd: StableDiffusion, processes: Processes, folder: Path | None):
        self.settings, self.sd, self.processes = settings, sd, processes
        size = picture_size(settings.size, sd.config)
        self.sources = open_settings(settings, size)
        train = self.sources.train
        self.bad = BadSamples(len(train), self.sources.problems, settings.bad_share)
        self.fingerprint = fingerprint(sd, train, size)
        with torch.no_grad():
            self.no_prompt = sd.encode_text([""])
        small = tuple(side // sd.config.vae.downscale for side in size)
        shape = (sd.config.vae.latent_channels, *small)
        self.draws = Draws(shape, sd.schedule.config.timesteps, settings.prompt_dropout, settings.seed)

        endless = folder is None and isinstance(train, WorldSource) and settings.pictures is None
        if processes.first:
            print(told(self.sources, endless))
        if folder is None:
            self.pairs = LivePairs(train, self.draws, Order(None if endless else len(train), settings.seed))
        else:
            self.pairs = self.cached_pairs(folder)
        self.held_out, self.preview = self.shown() if processes.first else (None, None)

    def cached_pairs(self, folder: Path) -> CachedPairs:
        train, processes = self.sources.train, self.processes
        if processes.first:
            prepare(folder, self.fingerprint)
        processes.wait()
        build(folder, train, self.sd, self.bad, self.settings.batch_size, processes.number, processes.count)
        processes.wait()
        cache = LatentCache(folder, train)
        self.bad.add(cache.missing())
        return CachedPairs(cache, self.draws, Order(len(cache), self.settings.seed))

    def shown(self) -> tuple[HeldOutLoss | None, Preview | None]:
        held_out, count = list(good_samples(self.sources.held_out)), self.settings.sample_count
        if held_out:
            loss = HeldOutLoss(self.sd, held_out, self.draws, self.no_prompt, self.settings.batch_size)
            return loss, Preview(self.sd, held_out[:count]) if count else None
        print("nothing is held out: there is no held-out loss, and the grids show pictures that are trained on")
        trained_on = list(islice(good_samples(self.sources.train), count))
        return None, Preview(self.sd, trained_on) if trained_on else None

    @property
    def samples_a_step(self) -> int:
        return self.settings.batch_size * self.settings.accumulate * self.processes.count

    def batches(self, seen: int) -> Iterator[Batch]:
        """This process's batches from position `seen` on, without end."""
        cuda = self.processes.device.type == "cuda"
        workers = self.settings.workers if self.settings.workers is not None else (4 if cuda else 0)
        order = positions(seen, self.settings.batch_size, self.processes.number, self.processes.count)
        loader = DataLoader(
            self.pairs, batch_sampler=order, num_workers=workers, pin_memory=cuda, worker_init_fn=start_worker
        )
        for batch in loader:
            self.bad.add(batch.bad)
            yield batch

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> z0, noise, t, context and hint: see `loss_inputs`."""
        return loss_inputs(self.sd, batch, self.no_prompt, self.processes.device)


def told(sources: Sources, endless: bool) -> str:
    """A line about what is trained on."""
    train, count = sources.train, "endless" if endless else len(sources.train)
    line = f"training on {count} pairs of {train.name}, {len(sources.held_out)} held out"
    if not isinstance(train, WorldSource):
        return line
    published = f" (the published set is not in {PUBLISHED_FILL50K})" if train.name == "fill50k" else ""
    return f"{line}: a procedural world, drawn here{published}"


def start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    os.setpgrp()  # Ctrl-C goes to a whole process group, and it is for the process that trains: this one must read on
