"""Latents and text states, computed once: the autoencoder and the text encoder are locked, so their outputs never
change, and without them on the device a batch needs far less memory.

A cache is a folder:

    cache.json              the fingerprint of model and data: a cache made from others is refused
    000000.safetensors ...  256 samples each: index (n,), mean and logvar (n, 4, h, w), context (n, 77, D)
    hints/000000.png ...    only where hints are computed, as in a synthetic dataset or with a detector

It keeps the mean and logvar of the autoencoder's posterior, not one sample of it, so each visit draws a new one. Files
are whole or not there, so a build that was stopped goes on where it was; one that was damaged since is computed again.
They are memory-mapped: the system keeps in memory what fits.
"""

import json
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from controlnet.common.image_files import open_image
from controlnet.common.images import Size, save_png, to_hints, to_images
from controlnet.objective import EncodedPairs
from controlnet.worlds import Sample
from ldm.checkpoints.save import save_checkpoint
from ldm.stable_diffusion import StableDiffusion

from .pairs import BadSample
from .run_state import write_text
from .sources import BadSamples, Source, differences, digest
from .workers import reading, start_worker

FORMAT = 2
SHARD = 256


@torch.no_grad()
def encode(sd: StableDiffusion, images: Tensor, captions: list[str]) -> EncodedPairs:
    """Images (B, 3, H, W) in [-1, 1] and captions -> moments (B, 4, h, w) and text states (B, 77, D), on its device."""
    posterior = sd.vae.posterior(images.to(sd.vae.quant_conv.bias))
    return EncodedPairs(posterior.mean, posterior.logvar, sd.encode_text(captions))


def fingerprint(sd: StableDiffusion, source: Source, size: Size) -> dict:
    """What the contents of a cache depend on."""
    modules = (sd.vae.encoder, sd.vae.quant_conv, sd.text_encoder)
    weights = [tensor for module in modules for tensor in module.state_dict().values()]
    return {
        "format": FORMAT,
        "base": digest(repr(sd.config.text).encode(), *(raw_bytes(tensor) for tensor in weights)),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "size": list(size),
        "samples": len(source),
        **source.fingerprint(),
    }


def ends_of_weights(module: nn.Module) -> str:
    """A hash of the first and the last numbers of each tensor: that of all numbers of a UNet takes seconds."""
    flat = [tensor.flatten() for tensor in module.state_dict().values()]
    return digest(*(raw_bytes(end) for tensor in flat for end in (tensor[:4096], tensor[-4096:])))


def raw_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def check_folder(folder: Path, wanted: dict) -> bool:
    """Whether there is a cache, which is then made from the same. Raises ValueError for any other folder but an empty
    one; hidden files do not count."""
    card = folder / "cache.json"
    if not card.exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(
                f'"{folder}" holds something else than cached latents: give an empty or new folder as --cache'
            )
        return False
    try:
        found = dict(json.loads(card.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'"{card}" is damaged ({error}): remove the folder, and it is computed again') from error
    if found != wanted:
        raise ValueError(
            f'the latents in "{folder}" are of other data or another base ({differences(found, wanted)}): remove that '
            "folder, or give another one as --cache"
        )
    return True


def prepare_folder(folder: Path, wanted: dict) -> None:
    """Makes the folder, unless it is one of the same. Raises ValueError as `check_folder` does."""
    if not check_folder(folder, wanted):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "cache.json", json.dumps(wanted, indent=2) + "\n")


def build(
    folder: Path,
    source: Source,
    sd: StableDiffusion,
    bad: BadSamples,
    size: Size,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Computes what is missing in a prepared folder; each of several processes its share of the files, and `workers`
    of its own read the images for it."""
    starts = range(0, len(source), SHARD)[rank::world_size]
    shards = [range(start, min(start + SHARD, len(source))) for start in starts]
    shards = [shard for shard in shards if not is_whole(shard_path(folder, shard[0]))]
    batches = {shard: cut(shard, encoding_batch(size)) for shard in shards}
    reader = DataLoader(
        Reader(folder, source),
        batch_sampler=[batch for shard in shards for batch in batches[shard]],
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=start_worker,
    )
    read = reading(reader)
    with tqdm(total=sum(map(len, shards)), desc="latents", unit="image", disable=rank > 0 or not shards) as bar:
        for shard in shards:
            rows = [encoded_rows(next(read), sd, bad, bar) for _ in batches[shard]]
            index = torch.cat([index for index, _ in rows])
            columns = zip(*(encoded for _, encoded in rows if encoded is not None), strict=True)
            tensors = dict(zip(EncodedPairs._fields, map(torch.cat, columns), strict=len(index) > 0))
            tensors = {"index": index, **tensors}
            save_checkpoint(shard_path(folder, shard[0]), tensors, {"crc32": checksum(tensors)})


def cut(indices: range, length: int) -> list[range]:
    return [indices[first : first + length] for first in range(0, len(indices), length)]


def encoding_batch(size: Size) -> int:
    """How many images are encoded at once: as many as four of 512x512 have pixels.

    Kernels that share a batch among threads round by its size, so that of the training must not matter here: the
    latents of a data set are the same for all runs on it. Without gradients this takes less memory than a step.
    """
    return max(1, 4 * 512**2 // (size[0] * size[1]))


class Reader(Dataset):
    """Index -> the index and its sample, or the sentence that says why that one is bad. What can be done here need not
    be done between two batches: hints that are computed are written, too."""

    def __init__(self, folder: Path, source: Source):
        self.folder, self.source = folder, source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Sample | str]:
        try:
            sample = self.source.sample(index)
        except BadSample as error:
            return index, str(error)
        if not self.source.hints_are_files:
            save_png(Image.fromarray(sample.hint), hint_path(self.folder, index), {})
        return index, sample


def encoded_rows(
    read: list[tuple[int, Sample | str]], sd: StableDiffusion, bad: BadSamples, bar: tqdm
) -> tuple[Tensor, EncodedPairs | None]:
    """-> the indices of the good ones of a batch, and their encodings on the CPU: None if there are none."""
    samples = {index: sample for index, sample in read if isinstance(sample, Sample)}
    for index, problem in read:
        if index not in samples:
            tqdm.write(f"skipped: {problem}")
            bad.add([index])
    encoded = None
    if samples:
        images = to_images(sample.image for sample in samples.values())
        encoded = EncodedPairs(*(x.cpu() for x in encode(sd, images, [sample.caption for sample in samples.values()])))
    bar.update(len(read))
    return torch.tensor(list(samples), dtype=torch.int64), encoded


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"{start:06d}.safetensors"


def hint_path(folder: Path, index: int) -> Path:
    return folder / "hints" / f"{index:06d}.png"


class LatentCache:
    """A complete cache, memory-mapped: row -> the index of its sample, its latents and its hint."""

    def __init__(self, folder: Path, source: Source, size: Size):
        self.folder, self.source, self.size = folder, source, size
        shards = [load_file(shard_path(folder, start)) for start in range(0, len(source), SHARD)]
        self.shards = [shard for shard in shards if len(shard["index"])]
        self.ends = np.cumsum([len(shard["index"]) for shard in self.shards])

    def __reduce__(self):
        """Spawned workers open the files themselves, in place of getting all latents."""
        return LatentCache, (self.folder, self.source, self.size)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, row: int) -> tuple[dict[str, Tensor], int]:
        """-> (shard, the row in it)"""
        number = int(np.searchsorted(self.ends, row, side="right"))
        return self.shards[number], row - (int(self.ends[number - 1]) if number else 0)

    def index(self, row: int) -> int:
        shard, i = self.locate(row)
        return int(shard["index"][i])

    def read(self, row: int, position: int) -> tuple[EncodedPairs, Tensor]:
        """Encoding and hint (C, H, W). Raises BadSample where the hint's file is gone or unreadable by now."""
        shard, i = self.locate(row)
        encoded = EncodedPairs(*(shard[name][i] for name in EncodedPairs._fields))
        return encoded, to_hints([self.hint(row)])[0]

    def hint(self, row: int) -> np.ndarray:
        """uint8 (H, W, C), computed again if the cache's file is lost or of another size. Raises BadSample."""
        index = self.index(row)
        if not self.source.hints_are_files:
            with suppress(ValueError):
                cached = np.array(open_image(hint_path(self.folder, index)))
                if cached.shape == (*self.size, 3):
                    return cached
        return self.source.hint(index)

    def missing(self) -> list[int]:
        """The indices of the bad samples, which have no row."""
        kept = torch.cat([shard["index"] for shard in self.shards]) if self.shards else torch.zeros(0)
        return sorted(set(range(len(self.source))) - set(kept.tolist()))


def is_whole(path: Path) -> bool:
    """Whether a shard is there, readable, and holds the bits that were written."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = (file.metadata() or {}).get("crc32") == checksum(tensors)
    except (OSError, SafetensorError):
        whole = False
    if not whole:
        tqdm.write(f'"{path}" is damaged: it is computed again')
    return whole


def checksum(tensors: dict[str, Tensor]) -> str:
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(raw_bytes(tensor), crc)
    return f"{crc:08x}"
