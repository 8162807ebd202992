"""Aspect buckets: their sizes, the order in which their batches come, and what is said of crops."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from controlnet.training.data import Pairs
from controlnet.training.framing import framing
from controlnet.training.order import Bucketed, Shuffled
from controlnet.training.pairs import BadSample, Entry
from controlnet.training.sources import FolderSource
from controlnet.training.transform import Transform, bucket_sizes, cropped_share


@pytest.mark.parametrize("size, multiple", [((512, 512), 64), ((128, 128), 32), ((512, 768), 64), ((64, 64), 64)])
def test_buckets_are_as_large_as_the_size_allows_in_both_directions(size, multiple):
    buckets = bucket_sizes(size, multiple)
    assert size in buckets and len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % multiple == width % multiple == 0 and height * width <= size[0] * size[1]
        assert (width, height) in buckets or (height, width) == size
        assert max(height, width) <= 4 * min(height, width)
        assert max((height + multiple) * width, height * (width + multiple)) > size[0] * size[1]
    assert {(576, 448), (640, 384), (256, 1024)} <= set(bucket_sizes((512, 512), 64))


@pytest.mark.parametrize(
    "image, expected", [((600, 600), (512, 512)), ((768, 1024), (448, 576)), ((900, 100), (1024, 256))]
)
def test_an_image_goes_where_the_least_is_cropped(image, expected):
    buckets = bucket_sizes((512, 512), 64)
    transform = Transform((512, 512), buckets=buckets)
    assert transform.size_for(image) == expected
    assert transform.of(image)(np.zeros((*image, 3), np.uint8)).shape == (*expected, 3)
    assert cropped_share(image, expected) == min(cropped_share(image, bucket) for bucket in buckets)


SIZES = [(64, 64)] * 5 + [(32, 128)] * 3 + [(128, 32)]  # fewer than a batch of some


def test_every_batch_has_one_size_and_every_sample_comes_as_often():
    order = Bucketed(SIZES, seed=3, batch_size=4)
    seen = [order.at(position) for position in range(4 * len(SIZES))]
    for batch in range(len(SIZES)):
        assert len({SIZES[i] for i in seen[4 * batch : 4 * batch + 4]}) == 1
    assert Counter(seen) == dict.fromkeys(range(len(SIZES)), 4)
    again = [order.at(position) for position in range(4 * len(SIZES), 8 * len(SIZES))]
    assert Counter(again) == Counter(seen) and again != seen
    square = [i for i in seen if SIZES[i] == (64, 64)]
    assert sorted(square[:5]) == [0, 1, 2, 3, 4]  # all of a size before one comes again


def test_what_stands_where_follows_from_seed_and_position_alone():
    positions = [17, 3, 200, 16]
    orders = [Bucketed(SIZES, seed, 4) for seed in (3, 3, 4)]
    orders[1].at(99)
    first, second, other = ([order.at(p) for p in positions] for order in orders)
    assert first == second and [orders[0].at(p) for p in range(36)] != [orders[2].at(p) for p in range(36)]


@pytest.mark.parametrize("order", [Bucketed(SIZES, 0, 4), Shuffled(len(SIZES), 0)])
def test_a_bad_sample_is_replaced_by_any_other_at_first_of_its_batches_size(order):
    for index, size in enumerate(SIZES):
        instead = order.instead(index)
        assert len(set(instead)) == len(instead) == len(SIZES) - 1 and index not in instead
        first = [SIZES[i] for i in instead[: SIZES.count(size) - 1]]
        assert isinstance(order, Shuffled) or first == [size] * len(first)


@pytest.mark.parametrize("bad", [{8}, {0, 1, 2, 3, 4}, {5, 6, 7, 8, 0}])
def test_a_batch_has_one_size_though_all_of_its_own_are_bad(bad):
    def read(index, position):
        if index in bad:
            raise BadSample("it is bad")
        return index, None

    pairs = Pairs(read, Bucketed(SIZES, seed=3, batch_size=4))
    seen = [pairs[position].content for position in range(4 * len(SIZES))]
    assert not bad & {*seen} and {pairs[p].bad.item() for p in range(4 * len(SIZES))} == {*bad, -1}
    assert all(len({SIZES[i] for i in seen[4 * batch : 4 * batch + 4]}) == 1 for batch in range(len(SIZES)))


def source_of(folder, sizes, **how):
    for i, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"")
    names = [*(f"{i}.png" for i in range(len(sizes))), "broken.png"]
    return FolderSource(str(folder), [Entry(folder / name, folder / name, "c") for name in names], Transform(**how))


def test_crops_and_enlargements_are_said_in_numbers(tmp_path):
    shapes = [(64, 64), (64, 128), (96, 128), (32, 64)]
    crop, enlarged = framing(source_of(tmp_path, shapes, size=(64, 64)), 8)
    assert crop.startswith("the crop to 64x64 takes 31% of an image on average, at most 50% (") and "1.png" in crop
    assert crop.endswith("; with --buckets 6% on average")
    assert enlarged.startswith("1 of 4 images are smaller than 64x64 and are enlarged, at most 2.0 times (")
    assert "3.png" in enlarged
    buckets = bucket_sizes((64, 64), 32)
    sizes, *rest = framing(source_of(tmp_path, shapes, size=(64, 64), buckets=buckets), 32)
    assert sizes.startswith("images of 2 sizes (width x height): ") and "64x64 for 2" in sizes
    assert framing(source_of(tmp_path, [(64, 64), (128, 128)], size=(64, 64)), 32) == []
