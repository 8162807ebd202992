"""Batches: which sample stands at each position of a run, and what replaces bad ones."""

import pickle

import numpy as np
import pytest
import torch
from small import small_sd
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from controlnet.common.images import to_hints, to_images
from controlnet.training.data import Pairs, TrainingData
from controlnet.training.distributed import Process
from controlnet.training.options import LAPTOP, TrainSettings
from controlnet.training.order import Shuffled, batch_positions, sample_at
from controlnet.training.pairs import BadSample
from controlnet.training.sources import BadSamples
from controlnet.training.workers import reading, start_worker

# ------------------------------------------------------------------------------------------------------- positions


def test_every_epoch_shows_all_samples_in_a_new_order():
    epochs = [[sample_at(p, 7, 0) for p in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert epochs[0] != [sample_at(p, 7, 1) for p in range(7)]
    assert sample_at(123456, None, 0) == 123456


def test_processes_share_the_positions():
    alone, first, second = (batch_positions(10, 4), batch_positions(10, 2, 0, 2), batch_positions(10, 2, 1, 2))
    for _ in range(3):
        assert [*next(alone)] == [*next(first), *next(second)]


def test_a_bad_sample_is_replaced_by_the_next_and_counted():
    def read(index, position):
        if index == 2:
            raise BadSample("it is bad")
        return torch.tensor(index), torch.tensor(0)

    pairs, bad, seen = Pairs(read, Shuffled(4, 0)), BadSamples(4, [], share=0.3), set()
    for position in range(8):
        batch, wanted = pairs[position], sample_at(position, 4, seed=0)
        assert batch.content == (3 if wanted == 2 else wanted) and batch.positions == position
        bad.add([int(batch.bad)])
        seen.add(int(batch.bad))
    assert seen == {-1, 2} and len(bad) == 1
    with pytest.raises(ValueError, match="2 of 5 samples are bad"):
        BadSamples(4, ["a line"], share=0.3).add([2, -1])


def test_where_all_samples_are_bad_no_share_allows_it():
    bad = BadSamples(2, ["a line"], share=1.0)
    bad.add([0])
    with pytest.raises(ValueError, match="3 of 3 samples are bad .*number 1.*, so none is left: see"):
        bad.add([1])
    assert len(BadSamples(0, [], share=0.0)) == 0


def test_nothing_but_bad_samples_is_one_sentence():
    def read(index, position):
        raise BadSample(f"number {index} is bad")

    with pytest.raises(BadSample, match="100 samples in a row are bad, the last: number"):
        Pairs(read, Shuffled(300, 0))[0]


class Failing(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise self.error


class InAWorker:
    """A loader whose worker raises, in PyTorch's words, but without a process to wait for."""

    num_workers = 1

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        try:
            yield self.dataset[0]
        except Exception:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()


@pytest.mark.parametrize("loader", [DataLoader, InAWorker])
@pytest.mark.parametrize(
    "error",
    [
        BadSample("a: b, see: c"),
        ValueError("one line\nand another, without more"),
        ValueError("not that ValueError: but this"),
        OSError(28, "No space left on device", "hints/a.png"),
    ],
)
def test_an_error_while_reading_is_the_same_whoever_reads(loader, error):
    """A full disk is not a lack of memory."""
    with pytest.raises(OSError if isinstance(error, OSError) else ValueError) as caught:
        next(reading(loader(Failing(error))))
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError(), BrokenPipeError()])
def test_a_lost_worker_is_not_the_disk(error):
    """What the queue between the processes says when one of them was killed."""

    class Loader:
        num_workers = 1

        def __iter__(self):
            raise error

    with pytest.raises(ValueError, match="^a process that reads data has ended .*--resume and fewer --workers"):
        next(reading(Loader()))


def test_an_endless_dataset_is_read_in_its_own_order():
    assert [Shuffled(5, 0, endless=True).at(p) for p in (4, 17)] == [4, 17]


def test_a_bad_pair_of_an_endless_dataset_is_replaced_by_the_next_position_and_counted_once():
    """Which comes again in another epoch, under another position."""

    def read(index, position):
        if index % 3 == 2:
            raise BadSample("it is bad")
        return torch.tensor(index), torch.tensor(0)

    pairs, bad = Pairs(read, Shuffled(3, 0, endless=True)), BadSamples(3, [], 0.4, name_of=lambda p: f"x/{p % 3}.png")
    assert [int(pairs[p].content) for p in range(8, 13)] == [9, 9, 10, 12, 12]
    bad.add(int(pairs[p].bad) for p in range(20))
    assert len(bad) == 1
    with pytest.raises(ValueError, match="for example x/1.png"):
        bad.add([4])


def test_pairs_travel_to_workers_that_are_spawned(tmp_path):
    """Windows and, from Python 3.14, Linux start workers by pickling what they read."""
    settings = TrainSettings(**{**LAPTOP, "images": 3, "no_cache": True, "validation": 0, "cache": tmp_path})
    data = TrainingData(settings, small_sd(), Process(0, 1, torch.device("cpu")))
    for _ in range(2):
        pickled = pickle.dumps((data.pairs, start_worker))
        assert len(pickled) < 5000  # neither networks nor latents
        other, _ = pickle.loads(pickled)
        assert torch.equal(other[5].hint, data.pairs[5].hint)
        data.compute_latents()
    assert torch.equal(other[5].content.mean, data.pairs[5].content.mean)


def test_arrays_become_tensors_in_the_range_of_their_use():
    array = np.zeros((2, 4, 3), np.uint8)
    array[0, 1] = (255, 51, 0)
    hint, image = to_hints([array]), to_images([array])
    assert hint.shape == image.shape == (1, 3, 2, 4)
    assert hint[0, :, 0, 1].tolist() == pytest.approx([1, 0.2, 0])
    assert image[0, :, 0, 1].tolist() == pytest.approx([1, -0.6, -1])
