"""What a run will write: tests/test_train.py compares it with what a run has written."""

from pathlib import Path

from small import SMALL

from controlnet.training.disk import gigabytes, latents_size
from controlnet.training.options import TrainSettings
from controlnet.training.pairs import Entry
from controlnet.training.sources import FolderSource
from controlnet.training.transform import Transform


def test_sizes_are_read_without_counting_digits():
    sizes = {5_124_000: "5.12 MB", 51_240: "0.0512 MB", 99_960_000: "100 MB", 123e6: "0.12 GB", 1.5e9: "1.50 GB"}
    assert {size: gigabytes(size) for size in sizes} == sizes


def test_latents_of_what_is_repeated_are_stored_once():
    def size_of(entries):
        source = FolderSource("x", entries, Transform((64, 64)))
        return latents_size(SMALL, TrainSettings(), source, (64, 64))

    one, other = (Entry(Path("0.png"), Path("h.png"), caption, repeats=3) for caption in ("a", "b"))
    assert size_of([one] * 3) == size_of([one]) and size_of([one] * 3 + [other]) == 2 * size_of([one])
