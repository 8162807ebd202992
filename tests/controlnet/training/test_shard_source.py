"""Pairs in tar archives: read by number or as a stream, whose order follows from seed and position alone."""

import io
import json
import pickle
import tarfile
from itertools import groupby

import numpy as np
import pytest
from PIL import Image

from controlnet.training.opening import open_sources
from controlnet.training.options import TrainSettings
from controlnet.training.pairs import BadSample, Wanted
from controlnet.training.pairs.shards import pairs_in
from controlnet.training.shard_source import Shard, ShardSource, ShardStream, count_in
from controlnet.training.sources import FolderSource
from controlnet.training.transform import Transform

FILES = FolderSource("x", [], Transform((8, 8)))


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pair(name, value, caption=None):
    """The files of a pair: the image is of one value, its hint of the next."""
    caption = f"number {value}" if caption is None else caption
    return {f"{name}.png": png(value), f"{name}.hint.png": png(value + 1), f"{name}.txt": caption.encode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Archives of 4, 1 and 3 pairs with the values 0, 10 ... 70."""
    folder, values = tmp_path_factory.mktemp("shards"), iter(range(0, 80, 10))
    for number, count in enumerate((4, 1, 3)):
        files = [pair(f"{i:04d}", next(values)) for i in range(count)]
        write_tar(folder / f"{number:06d}.tar", {name: content for one in files for name, content in one.items()})
    return folder


def value(sample):
    assert (sample.hint == sample.image[0, 0, 0] + 1).all() and sample.caption == f"number {sample.image[0, 0, 0]}"
    return int(sample.image[0, 0, 0])


def stream_of(folder, seed=0, **settings):
    given = dict(data=str(folder), no_cache=True, validation=1, seed=seed) | settings
    return open_sources(TrainSettings(**given), (8, 8)).train


def test_pairs_by_number_are_those_of_all_archives_in_order(folder):
    sources = open_sources(TrainSettings(data=str(folder), validation=1), (8, 8))
    assert not sources.endless and len(sources.train) == 7
    assert [value(sources.train.sample(i)) for i in range(7)] == [10, 20, 30, 40, 50, 60, 70]
    assert [value(sources.validation.sample(i)) for i in range(len(sources.validation))] == [0]
    assert np.array_equal(sources.train.hint(6), sources.train.sample(6).hint)
    assert sources.train.name_of(3) == f"{folder}/000001.tar/0000.png"
    one = open_sources(TrainSettings(data=str(folder / "000002.tar")), (8, 8))
    assert [value(one.train.sample(i)) for i in range(len(one.train))] == [60, 70]


@pytest.mark.parametrize("images, found", [(2, [10, 20]), (4, [10, 20, 30, 40]), (100, [10, 20, 30, 40, 50, 60, 70])])
def test_the_first_images_are_those_of_the_first_archives(folder, images, found):
    train = open_sources(TrainSettings(data=str(folder), validation=1, images=images), (8, 8)).train
    assert [value(train.sample(i)) for i in range(len(train))] == found


def test_a_stream_shows_each_epoch_all_pairs_archive_by_archive_in_a_new_order(folder):
    stream = stream_of(folder)
    epochs = [[value(stream.sample(7 * epoch + i)) for i in range(7)] for epoch in range(6)]
    assert all(sorted(epoch) == [10, 20, 30, 40, 50, 60, 70] for epoch in epochs)
    archives = {10: 0, 20: 0, 30: 0, 40: 1, 50: 2, 60: 2, 70: 2}
    orders = [[archive for archive, _ in groupby(map(archives.get, epoch))] for epoch in epochs]
    assert all(len(order) == 3 for order in orders)  # each archive is read in one go
    assert len(set(map(tuple, orders))) > 2
    assert len({tuple(found for found in epoch if found < 40) for epoch in epochs}) > 2
    assert epochs[0] != [value(stream_of(folder, seed=1).sample(i)) for i in range(7)]


def test_a_stream_goes_on_anywhere_as_if_it_had_never_stopped(folder):
    stream = stream_of(folder)
    expected = [stream.name_of(position) for position in range(30)]
    for start in (0, 3, 7, 17, 29):
        resumed = pickle.loads(pickle.dumps(stream_of(folder)))
        assert [resumed.name_of(position) for position in range(start, 30)] == expected[start:]
    assert [stream.name_of(position) for position in reversed(range(30))] == expected[::-1]


def test_a_stream_opens_an_archive_when_it_comes_to_it(folder, monkeypatch):
    opened = []
    monkeypatch.setattr("tarfile.open", lambda path, mode, open=tarfile.open: opened.append(path) or open(path, mode))
    pairs_in.cache_clear()
    count_in.cache_clear()
    stream = stream_of(folder)
    assert {path.name for path in opened} == {"000000.tar"} and len(stream) == 3 * 3
    stream.sample(0)
    assert len(set(opened)) <= 2


def test_what_a_pair_may_be_called(tmp_path):
    files = {
        "a/1.jpg": png(10),
        "a/1.json": json.dumps({"caption": "number 10", "width": 8}).encode(),
        "a/1.conditioning_image.png": png(11),
        "a/2.target.png": png(20),
        "a/2.source.png": png(21),
        "a/2.json": b"{}",
        "a/2.txt": b"number 20",
        **pair("a/3", 30, caption=" \n"),
        "a/3.json": json.dumps({"caption": "number 30"}).encode(),
        "a/._1.jpg": b"",
        "notes.md": b"",
        "LICENSE": b"",
    }
    source = ShardSource([Shard(write_tar(tmp_path / "x.tar", files))], Wanted(), FILES)
    assert [value(source.sample(i)) for i in range(len(source))] == [10, 20, 30]


BAD = {
    "no hint": ({"1.png": png(0), "1.txt": b"x"}, "1.png has no hint"),
    "no caption": (pair("1", 0, caption=""), "1.png has no caption"),
    "no image": (pair("1", 0) | {"1.png": b"broken"}, '1.png" is not readable'),
    "a broken hint": (pair("1", 0) | {"1.hint.png": b"broken"}, '1.hint.png" is not readable'),
    "another encoding": (pair("1", 0) | {"1.txt": "caf\xe9".encode("latin-1")}, '1.txt" is not UTF-8'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_named_by_its_archive(tmp_path, name):
    files, words = BAD[name]
    source = ShardSource([Shard(write_tar(tmp_path / "x.tar", files))], Wanted(), FILES)
    with pytest.raises(BadSample, match=f"{tmp_path}/x.tar/{words}"):
        source.sample(0)


def test_a_prompt_or_a_detector_stands_for_what_is_not_there(tmp_path):
    shards = [Shard(write_tar(tmp_path / "x.tar", {"1.png": png(0)}))]
    source = ShardSource(
        shards, Wanted(hints=False, prompt="a bird"), FolderSource("x", [], Transform((64, 64)), detect="canny")
    )
    assert source.sample(0).caption == "a bird" and source.sample(0).hint.shape == (64, 64, 3)


@pytest.mark.parametrize("content", [b"\x1f\x8b no tar" * 99, b""])
def test_what_is_no_archive_is_one_sentence(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=f'"{tmp_path}/0.tar" is not readable as a tar'):
        stream_of(tmp_path)


def test_archives_without_pairs_are_one_sentence(tmp_path):
    write_tar(tmp_path / "0.tar", {"1.md": b""})
    with pytest.raises(ValueError, match="usable pairs in .*0.tar: 0,"):
        stream_of(tmp_path)
    empty = ShardStream([Shard(tmp_path / "0.tar")], Wanted(), FILES)
    with pytest.raises(ValueError, match="hold no pair"):
        empty.sample(0)


def test_a_fingerprint_sees_other_archives(folder, tmp_path):
    def fingerprint(path, **settings):
        return (
            open_sources(TrainSettings(data=str(path), validation=1, **settings), (8, 8)).train.identity().fingerprint
        )

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert fingerprint(tmp_path) == fingerprint(folder) != fingerprint(folder, prompt="x")
    write_tar(tmp_path / "000001.tar", pair("0000", 99))
    assert fingerprint(tmp_path) != fingerprint(folder)


def test_latents_of_shards_are_found_by_what_they_were_made_from(folder, tmp_path):
    """A key for each pair, which another archive beside theirs leaves alone."""

    def keys(path, **settings):
        return open_sources(TrainSettings(data=str(path), validation=1, **settings), (8, 8)).train.identity().keys

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = keys(tmp_path)
    assert len(set(before)) == len(before) and keys(folder) == before
    write_tar(tmp_path / "zzz.tar", pair("0000", 99))
    assert keys(tmp_path)[: len(before)] == before and len(keys(tmp_path)) == len(before) + 1
    assert not set(keys(folder, prompt="x")) & set(before)
    assert keys(folder, no_cache=True) == []  # a stream
