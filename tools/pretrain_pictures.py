"""The images that pretraining sees: drawn once from all synthetic datasets, and kept in OUT with their captions.

Drawing takes longer than a step of the autoencoder on them; a stored image costs one read from a memory-mapped file.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from torch.utils.data import DataLoader
from tqdm import tqdm

from controlnet.training.run_state import write_text
from controlnet.worlds import Fill50k, People, Scenes, Shapes, World
from ldm.checkpoints.files import new_file


@dataclass(frozen=True)
class Pictures:
    images: np.ndarray  # uint8 (N, H, W, 3), a memory-mapped file
    captions: list[str]


def validation_worlds(size: int) -> list[World]:
    return [kind(size, held_out=True) for kind in (Scenes, People, Shapes, Fill50k)]


def mixture(size: int, seed: int) -> list[World]:
    """What is trained on, in turn: half of it scenes, which have most to be learned."""
    scenes = (Scenes(size, 3 * seed + i) for i in range(3))  # by seeds of their own, so that none comes twice
    others = (kind(size, seed) for kind in (People, Shapes, Fill50k))
    return [world for pair in zip(scenes, others, strict=True) for world in pair]


def open_pictures(folder: Path, size: int, count: int, seed: int) -> Pictures:
    """The first `count` samples, drawn if they are not there yet."""
    images, captions = folder / "pictures.npy", folder / "captions.json"
    if not captions.exists():
        draw_pictures(Drawings(mixture(size, seed), count), size, images, captions)
    pictures = Pictures(np.load(images, mmap_mode="r"), json.loads(captions.read_text()))
    if len(pictures.captions) != count:
        raise ValueError(f"{images} holds {len(pictures.captions)} images, expected {count}: give another --out")
    return pictures


def draw_pictures(drawings: "Drawings", size: int, images: Path, captions: Path) -> None:
    """Writes the captions last: without them the drawing was stopped, and begins again."""
    drawn = DataLoader(drawings, batch_size=None, num_workers=os.cpu_count() or 1, collate_fn=tuple)
    drawn_captions = []
    with new_file(images) as temporary:
        file = open_memmap(temporary, "w+", np.uint8, (len(drawings), size, size, 3))
        for i, (image, caption) in enumerate(tqdm(drawn, "drawing", mininterval=10)):
            file[i] = image
            drawn_captions.append(caption)
        file.flush()
    write_text(captions, json.dumps(drawn_captions))


@dataclass(frozen=True)
class Drawings:
    """`count` images and captions, of several worlds in turn."""

    worlds: list[World]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        turn, world = divmod(index, len(self.worlds))
        picture = self.worlds[world].draw(turn)
        return picture.image, picture.caption
