"""Latents and text states computed once: right, resumable, and refused when they are of something else."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SMALL, small_sd

from controlnet.common.images import to_hints, to_images
from controlnet.hints import detect
from controlnet.training import latent_cache
from controlnet.training.latent_cache import build, encoding_batch, fingerprint, prepare_folder
from controlnet.training.pair_files import read_pixels
from controlnet.training.pairs import BadSample, Entry
from controlnet.training.prepare import with_packed_encoders
from controlnet.training.sources import BadSamples, FolderSource, WorldSource
from controlnet.training.stored_latents import LatentCache, hint_path
from controlnet.training.transform import Transform, bucket_sizes

SIZE = (SMALL.resolution, SMALL.resolution)


@pytest.fixture(scope="module")
def sd():
    return small_sd()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD", 4)


CARD = {"format": 1, "base": "mine", "dtype": "float32"}


def built(folder, source, sd, **how):
    keys = source.identity().keys
    prepare_folder(folder, CARD)
    build(folder, source, keys, sd, BadSamples(len(source), [], 0.9), **how)
    return LatentCache(folder, source, keys)


def counted(source, monkeypatch):
    """-> the indices of the samples that are read from now on."""
    original, calls = source.sample, []
    monkeypatch.setattr(source, "sample", lambda i, *rest: calls.append(i) or original(i, *rest))
    return calls


def shards(folder):
    """The files in the order of their making."""
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def test_a_row_is_what_the_model_says_of_its_sample(sd, tmp_path):
    source = WorldSource("people", SIZE, 6)
    cache = built(tmp_path, source, sd)
    assert len(cache) == 6 and len(list(tmp_path.glob("*.safetensors"))) == 2
    for row in (0, 3, 4, 5):
        sample, (latents, hint) = source.sample(row), cache.read(row, 0)
        posterior = sd.vae.posterior(to_images([sample.image]))
        torch.testing.assert_close(latents.mean[None], posterior.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(latents.logvar[None], posterior.logvar, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(latents.context[None], sd.encode_text([sample.caption]), rtol=1e-3, atol=1e-4)
        assert torch.equal(hint, to_hints([sample.hint])[0])
        assert np.array_equal(cache.hint(row), sample.hint) and cache.index(row) == row


def test_what_is_there_is_not_computed_again_and_processes_share_the_rest(sd, tmp_path, monkeypatch):
    source = WorldSource("fill50k", SIZE, 10)
    calls = counted(source, monkeypatch)
    assert len(built(tmp_path, source, sd, rank=1, world_size=2)) == 4 and calls == [4, 5, 6, 7]
    (tmp_path / ".000000.safetensors.1.tmp").mkdir()  # of a run that was killed
    assert len(built(tmp_path, source, sd)) == 10 and calls == [4, 5, 6, 7, 0, 1, 2, 3, 8, 9]
    more = WorldSource("fill50k", SIZE, 12)  # of the same world
    calls = counted(more, monkeypatch)
    assert len(built(tmp_path, more, sd)) == 12 and calls == [10, 11]


def test_workers_change_no_bit_and_batches_no_more_than_rounding(tmp_path, monkeypatch):
    """Each with networks of its own: packed weights remember the shape that came first."""
    source, files, hints = WorldSource("people", SIZE, 7), [], []
    for name, workers, at_once in (("alone", 0, 256), ("workers", 2, 256), ("one by one", 1, 1)):
        monkeypatch.setattr(latent_cache, "encoding_batch", lambda size, at_once=at_once: at_once)
        cache = built(tmp_path / name, source, with_packed_encoders(small_sd()), workers=workers)
        assert cache.table[:, 2].tolist() == [0, 1, 2, 3, 0, 1, 2]
        files.append({path.name: load_file(path) for path in cache.paths})
        hints.append([path.read_bytes() for path in sorted((tmp_path / name / "hints").iterdir())])
    assert len(files[0]) == 2 and files[0].keys() == files[1].keys() == files[2].keys()
    assert len(hints[0]) == 7 and hints[0] == hints[1] == hints[2]
    for file, tensors in files[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, files[1][file][name])
            torch.testing.assert_close(tensor, files[2][file][name], rtol=1e-3, atol=1e-3)


def test_batches_of_the_cache_depend_on_the_size_alone():
    sizes = [(64, 64), (512, 512), (512, 768), (2048, 2048)]
    assert [encoding_batch(size) for size in sizes] == [256, 4, 2, 1]


def test_workers_that_are_spawned_open_the_files_again(sd, tmp_path):
    """Pickled tensors would be copies of the whole cache."""
    cache = built(tmp_path, WorldSource("fill50k", SIZE, 6), sd)
    pickled = pickle.dumps(cache)
    assert len(pickled) < len(pickle.dumps(cache.source)) + 1000 < len(pickle.dumps(cache.shards))
    (mean, *_), hint = pickle.loads(pickled).read(4, 0)
    assert torch.equal(mean, cache.read(4, 0)[0].mean) and torch.equal(hint, cache.read(4, 0)[1])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_rows_are_mapped_not_read(sd, tmp_path):
    cache = built(tmp_path, WorldSource("fill50k", SIZE, 4), sd)
    assert len(cache) == 4 and str(cache.paths[0]) in Path("/proc/self/maps").read_text()


def test_bad_samples_have_no_row(sd, tmp_path, monkeypatch):
    source = WorldSource("fill50k", SIZE, 6)
    original = source.sample

    def sample(i, generator=None):
        if i in (1, 4):
            raise BadSample("it is bad")
        return original(i)

    monkeypatch.setattr(source, "sample", sample)
    cache = built(tmp_path, source, sd)
    assert len(cache) == 4 and [cache.index(row) for row in range(4)] == [0, 2, 3, 5]
    assert cache.missing() == [1, 4]
    assert np.array_equal(cache.hint(3), original(5).hint)
    calls = counted(source, monkeypatch)
    assert len(built(tmp_path, source, sd)) == 4 and not calls  # what was bad is not tried again


@pytest.mark.parametrize("change", ["base", "text", "dtype"])
def test_a_cache_of_another_base_is_refused(sd, tmp_path, change):
    identity = WorldSource("fill50k", SIZE, 4).identity()
    prepare_folder(tmp_path, fingerprint(sd, identity, SIZE))
    card = tmp_path / "cache.json"
    card.write_text(card.read_text() + " ")
    prepare_folder(tmp_path, fingerprint(small_sd(), identity, SIZE))  # the same again is welcome, and stays as it is
    assert card.read_text().endswith(" ")
    other = small_sd()
    if change == "dtype":
        other = other.half()
    else:
        parameter = (other.vae.quant_conv if change == "base" else other.text_encoder.final_norm).weight
        with torch.no_grad():
            parameter.flatten()[-1] += 1e-3
    with pytest.raises(ValueError, match="of another base") as caught:
        prepare_folder(tmp_path, fingerprint(other, identity, SIZE))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def other_pixels(folder):
    image = np.asarray(Image.open(folder / "1.png")).copy()
    image[0, 0] ^= 1
    Image.fromarray(image).save(folder / "1.png")


def moved(folder):
    folder.rename(folder.with_name("elsewhere"))
    for path in folder.with_name("elsewhere").iterdir():
        os.utime(path, (1, 1))


EDITS = {  # what is done to five pairs -> the samples that are computed again
    "nothing": (lambda folder: None, []),
    "moved": (moved, []),
    "a pixel": (other_pixels, [1]),
    "a caption": (lambda folder: (folder / "2.txt").write_text("else"), [2]),
    "a new first image": (lambda folder: Image.new("RGB", SIZE, "red").save(folder / "-.png"), [0]),
    "another hint": (lambda folder: Image.new("RGB", SIZE, "red").save(folder / "h3.jpg"), []),
    "one removed": (lambda folder: (folder / "0.png").unlink(), []),
    "the same twice": (lambda folder: shutil.copy(folder / "0.png", folder / "9.png"), []),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_edited_costs_its_own_latents(sd, tmp_path, monkeypatch, edit):
    folder, change = tmp_path / "pairs", EDITS[edit][0]
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", SIZE, (50 * i, 0, 9)).save(folder / f"{i}.png")
        Image.new("RGB", SIZE, (50 * i, 0, 9)).save(folder / f"h{i}.jpg")

    def pairs():
        place = folder if folder.exists() else folder.with_name("elsewhere")
        texts = {path.stem: path.read_text() for path in place.glob("*.txt")}
        images = sorted(place.glob("*.png"))
        entries = [Entry(p, place / f"h{min(i, 4)}.jpg", texts.get(p.stem, "c")) for i, p in enumerate(images)]
        return FolderSource(str(place), entries, Transform(SIZE))

    before = built(tmp_path / "cache", pairs(), sd)
    change(folder)
    after = pairs()
    calls = counted(after, monkeypatch)
    cache = built(tmp_path / "cache", after, sd)
    assert calls == EDITS[edit][1] and len(cache) == len(after)
    if edit == "one removed":
        assert torch.equal(cache.read(0, 0)[0].mean, before.read(1, 0)[0].mean)
    if edit == "the same twice":
        assert torch.equal(cache.read(5, 0)[0].mean, before.read(0, 0)[0].mean)


def test_latents_serve_another_detector_which_makes_its_own_hints(sd, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    encoded = []
    encode = latent_cache.encode
    monkeypatch.setattr(latent_cache, "encode", lambda *arguments: encoded.append(1) or encode(*arguments))
    entries = [Entry(tmp_path / f"{i}.png", None, "c") for i in range(2)]
    for name in ("canny", "invert"):
        source = FolderSource(str(tmp_path), entries, Transform(SIZE), detect=name)
        cache = built(tmp_path / "cache", source, sd)
        calls = counted(source, monkeypatch)
        assert np.array_equal(cache.hint(1), detect(name, read_pixels(entries[1].image))) and not calls
    assert len(encoded) == 1 and len(list((tmp_path / "cache" / "hints").iterdir())) == 4


def test_each_size_has_files_of_its_own(sd, tmp_path):
    for i, size in enumerate([(64, 64), (128, 32), (66, 64), (120, 32), (64, 64)]):
        Image.new("RGB", size, (50 * i, 0, 9)).save(tmp_path / f"{i}.png")
    entries = [Entry(tmp_path / f"{i}.png", tmp_path / f"{i}.png", "c") for i in range(5)]
    source = FolderSource(str(tmp_path), entries, Transform(SIZE, buckets=bucket_sizes(SIZE, 32)))
    cache = built(tmp_path / "cache", source, sd)
    assert [cache.size(row) for row in range(5)] == [(64, 64), (32, 128), (64, 64), (32, 128), (64, 64)]
    assert len(cache.paths) == 2
    for row in range(5):
        encoded, hint = cache.read(row, 0)
        assert encoded.mean.shape == (4, *(side // 8 for side in cache.size(row)))
        assert hint.shape == (3, *cache.size(row))


def test_a_folder_of_something_else_is_left_alone(sd, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="something other than cached latents"):
        prepare_folder(tmp_path, CARD)


def test_hidden_files_are_nothing_else(tmp_path):
    """Also those of a process that was killed before cache.json had its name."""
    (tmp_path / ".DS_Store").touch()
    (tmp_path / ".cache.json.123.tmp").mkdir()
    prepare_folder(tmp_path, {**CARD, "samples": 1})
    assert json.loads((tmp_path / "cache.json").read_text()) == CARD


@pytest.mark.parametrize("card", [b"{", b"[1]", b"\xff", b"[" * 100_000, None])
def test_a_damaged_card_is_named(tmp_path, card):
    path = tmp_path / "cache.json"
    path.mkdir() if card is None else path.write_bytes(card)
    with pytest.raises(ValueError, match="cache.json.*remove the folder"):
        prepare_folder(tmp_path, CARD)


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where if where >= 0 else len(data) + where] ^= 4
    path.write_bytes(data)


def damages():
    yield "cut", lambda path: path.write_bytes(path.read_bytes()[:-100])
    yield "empty", lambda path: path.write_bytes(b"")
    yield "foreign", lambda path: path.write_bytes(b"damaged")
    yield "lost", lambda path: path.unlink()
    yield "no checksum", lambda path: save_file(load_file(path), path)
    for where in (3, 12, 40, 150, 2000, -5000, -1):
        yield f"bit {where}", lambda path, where=where: flip(path, where)


@pytest.mark.parametrize("damage", [pytest.param(do, id=name) for name, do in damages()])
def test_a_damaged_shard_is_computed_again(sd, tmp_path, damage, capsys):
    source = WorldSource("fill50k", SIZE, 8)
    built(tmp_path, source, sd)
    path, other = shards(tmp_path)
    before, kept = safetensors.torch.load(path.read_bytes()), other.stat().st_mtime_ns
    damage(path)
    built(tmp_path, source, sd)
    after = load_file(path)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert other.stat().st_mtime_ns == kept
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 1 and all(line == f'"{path}" is damaged: it is computed again' for line in said)


def test_a_damaged_shard_of_another_runs_data_is_removed_and_said_once(sd, tmp_path, capsys):
    source, path, mine = WorldSource("fill50k", SIZE, 2), tmp_path / "0123456789abcdef.safetensors", "lora.safetensors"
    built(tmp_path, source, sd)
    path.write_bytes(b"cut")
    (tmp_path / mine).touch()
    for said in (f'"{path}" is damaged: it is computed again\n', ""):
        built(tmp_path, source, sd)
        assert capsys.readouterr().out == said and not path.exists()
    assert (tmp_path / mine).exists() and len(shards(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["lost", "gray", "small", "palette", "foreign"])
def test_a_cached_hint_that_is_none_is_computed_again(sd, tmp_path, damage):
    source = WorldSource("fill50k", SIZE, 3)
    cache = built(tmp_path, source, sd)
    path = hint_path(tmp_path, source.identity().keys[1].hint)
    if damage == "lost":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(b"no image")
    else:
        image = Image.open(path)
        {"gray": image.convert("L"), "small": image.resize((32, 32)), "palette": image.quantize()}[damage].save(path)
    assert np.array_equal(cache.hint(1), source.sample(1).hint)
    assert torch.equal(cache.read(1, 0)[1], to_hints([source.sample(1).hint])[0])
