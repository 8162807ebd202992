"""Latents and text states, computed once: the autoencoder and the text encoder are locked, so their outputs never
change, and without them on the device a batch needs far less memory.

A cache is a folder:

    cache.json              what it was made with: a cache of another base is refused
    *.safetensors           up to 256 samples of one size each: mean and logvar (n, 4, h, w), context (n, 77, D)
    hints/*.png             only where hints are computed, as in a synthetic dataset or with a detector

A sample is found by a digest of its image and caption (identity.py), so runs on any data can share a folder, and what
was edited or added costs its own latents alone. It keeps the mean and logvar of the autoencoder's posterior, not one
sample of it, so each visit draws a new one. Files are whole or not there, so a build that was stopped goes on where it
was; one that was damaged since is computed again. They are memory-mapped: the system keeps in memory what fits.
"""

import json
from collections.abc import Sequence
from itertools import chain, groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from controlnet.common.images import Size, save_png, to_images
from controlnet.objective import EncodedPairs
from controlnet.worlds import Sample
from ldm.checkpoints.save import save_checkpoint
from ldm.stable_diffusion import StableDiffusion

from .identity import Identity, Key, differences, digest, digest_of
from .pairs import BadSample
from .run_state import write_text
from .sources import BadSamples, Source
from .stored_latents import Stored, checksum, hint_as_image, hint_path, raw_bytes
from .workers import reading, start_worker

FORMAT = 3
SHARD = 256
MADE_WITH = ("format", "base", "dtype")  # what all latents of a cache have in common


@torch.no_grad()
def encode(sd: StableDiffusion, images: Tensor, captions: list[str]) -> EncodedPairs:
    """Images (B, 3, H, W) in [-1, 1] and captions -> moments (B, 4, h, w) and text states (B, 77, D), where `sd` is."""
    posterior = sd.vae.posterior(images.to(sd.vae.quant_conv.bias))
    return EncodedPairs(posterior.mean, posterior.logvar, sd.encode_text(captions))


def fingerprint(sd: StableDiffusion, identity: Identity, size: Size) -> dict:
    """What a run recognises its base and its data by."""
    modules = (sd.vae.encoder, sd.vae.quant_conv, sd.text_encoder)
    weights = [tensor for module in modules for tensor in module.state_dict().values()]
    return {
        "format": FORMAT,
        "base": digest(repr(sd.config.text).encode(), *(raw_bytes(tensor) for tensor in weights)),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "size": list(size),
        "samples": len(identity.keys),
        **identity.fingerprint,
    }


def ends_of_weights(module: nn.Module) -> str:
    """A hash of the first and the last numbers of each tensor: that of all numbers of a UNet takes seconds."""
    flat = [tensor.flatten() for tensor in module.state_dict().values()]
    return digest(*(raw_bytes(end) for tensor in flat for end in (tensor[:4096], tensor[-4096:])))


def card_of(folder: Path) -> dict | None:
    """What a cache was made with; None if the folder is not there or empty, hidden files aside. Raises ValueError if
    it holds anything else."""
    card = folder / "cache.json"
    if not card.exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(
                f'"{folder}" holds something other than cached latents: give an empty or new folder as --cache'
            )
        return None
    try:
        return dict(json.loads(card.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'"{card}" is damaged ({error}): remove the folder, and it is computed again') from error


def check_folder(folder: Path, fingerprint: dict) -> None:
    """Raises ValueError if the folder holds the cache of another base, and as `card_of` does."""
    found = card_of(folder)
    if found is not None and (differing := differences(made_with(found), made_with(fingerprint))):
        raise ValueError(
            f'the latents in "{folder}" are of another base ({differing}): remove that folder, or give another one as '
            "--cache"
        )


def made_with(fingerprint: dict) -> dict:
    return {name: fingerprint.get(name) for name in MADE_WITH}


def prepare_folder(folder: Path, fingerprint: dict) -> None:
    """Makes an empty cache, or keeps that of the same base. Raises ValueError as `check_folder` does."""
    check_folder(folder, fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    if not (card := folder / "cache.json").exists():
        write_text(card, json.dumps(made_with(fingerprint), indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------- building


def build(
    folder: Path,
    source: Source,
    keys: Sequence[Key],
    sd: StableDiffusion,
    bad: BadSamples,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Computes what a prepared folder lacks. Each of several processes computes its share of the files, and has
    `workers` processes of its own to read the images."""
    shares = shares_of(source, keys)[rank::world_size]
    stored = Stored(folder, [keys[i] for share in shares for i in share], check=True)
    missing = [[i for i in share if not stored.has(keys[i])] for share in shares]
    shards = [cut(indices, encoding_batch(source.size(indices[0]))) for indices in missing if indices]
    # Latents that are there may lack the hints of this run's detector. They come last, and are only read.
    hints = [i for share in shares for i in share if stored.has(keys[i]) and stored.lacks_hint(source, keys[i])]
    batches = [*chain.from_iterable(shards), *cut(hints, SHARD)]
    how = dict(num_workers=workers, collate_fn=list, worker_init_fn=start_worker)
    read = reading(DataLoader(Reader(folder, source, keys), batch_sampler=batches, **how))
    total = sum(map(len, batches))
    with tqdm(total=total, desc="latents", unit="image", disable=rank > 0 or not total) as bar:
        for shard in shards:
            rows = {}
            for _ in shard:
                rows |= encoded_rows(next(read), sd, bad, bar)
            write_shard(folder, source, list(chain.from_iterable(shard)), keys, rows)
        for samples in read:
            bar.update(len(samples))


def shares_of(source: Source, keys: Sequence[Key]) -> list[list[int]]:
    """The samples of each file, which all have one size, so that they fit into batches. Of equal ones the first."""
    firsts: dict[Key, int] = {}
    for i, key in enumerate(keys):
        firsts.setdefault(key, i)
    sizes = groupby(sorted(firsts.values(), key=source.size), key=source.size)
    return [share for _, indices in sizes for share in cut(list(indices), SHARD)]


def write_shard(
    folder: Path, source: Source, indices: list[int], keys: Sequence[Key], rows: dict[int, EncodedPairs]
) -> None:
    """Writes a file with the rows of these samples; those without a row are bad. It is named by what it holds, so that
    one that is computed again replaces the damaged one."""
    tensors = {"size": torch.tensor(source.size(indices[0]))}
    for i, name in enumerate(EncodedPairs._fields if rows else ()):
        tensors[name] = torch.stack([row[i] for row in rows.values()])
    names = {"keys": [keys[i].latents for i in rows], "bad": [list(keys[i]) for i in indices if i not in rows]}
    text = json.dumps(names)
    path = folder / f"{digest_of(keys[i].latents for i in indices)}.safetensors"
    save_checkpoint(path, tensors, {"samples": text, "crc32": checksum(tensors, text)})


def cut(indices: list[int], length: int) -> list[list[int]]:
    return [indices[first : first + length] for first in range(0, len(indices), length)]


def encoding_batch(size: Size) -> int:
    """How many images are encoded at once: as many as four of 512x512 have pixels.

    Kernels that share a batch among threads round differently for each size of it. So the training's batch size must
    not matter here: the latents of a data set are the same for all runs on it. Without gradients this takes less memory
    than a step.
    """
    return max(1, 4 * 512**2 // (size[0] * size[1]))


class Reader(Dataset):
    """Index -> the index and its sample, or a sentence that says why that one is bad. Computed hints are written here,
    too, where workers do it beside the encoding."""

    def __init__(self, folder: Path, source: Source, keys: Sequence[Key]):
        self.folder, self.source, self.keys = folder, source, keys

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Sample | str]:
        try:
            sample = self.source.sample(index)
        except BadSample as error:
            return index, str(error)
        if not self.source.hints_are_files:
            save_png(hint_as_image(sample.hint), hint_path(self.folder, self.keys[index].hint), {})
        return index, sample


def encoded_rows(
    read: list[tuple[int, Sample | str]], sd: StableDiffusion, bad: BadSamples, bar: tqdm
) -> dict[int, EncodedPairs]:
    """Encodes the good samples of a batch -> each by its index, without the batch's axis, on the CPU."""
    samples = {index: sample for index, sample in read if isinstance(sample, Sample)}
    for index, problem in read:
        if index not in samples:
            tqdm.write(f"skipped: {problem}")
            bad.add([index])
    bar.update(len(read))
    if not samples:
        return {}
    images = to_images(sample.image for sample in samples.values())
    encoded = encode(sd, images, [sample.caption for sample in samples.values()])
    return dict(zip(samples, map(EncodedPairs, *(tensor.cpu() for tensor in encoded)), strict=True))
