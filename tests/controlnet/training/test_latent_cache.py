"""Latents and text states computed once: right, resumable, and refused when they are of something else."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SMALL, small_sd

from controlnet.common.images import to_hints, to_images
from controlnet.training import latent_cache
from controlnet.training.latent_cache import LatentCache, build, encoding_batch, fingerprint, prepare_folder
from controlnet.training.pairs import BadSample
from controlnet.training.prepare import with_packed_encoders
from controlnet.training.sources import BadSamples, WorldSource

SIZE = (SMALL.resolution, SMALL.resolution)


@pytest.fixture(scope="module")
def sd():
    return small_sd()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD", 4)


def built(folder, source, sd, size=SIZE, **how):
    bad = BadSamples(len(source), [], 0.5)
    prepare_folder(folder, fingerprint(sd, source, SIZE))
    build(folder, source, sd, bad, size, **how)
    return LatentCache(folder, source, SIZE)


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
    source, calls = WorldSource("fill50k", SIZE, 10), []
    original = source.sample
    monkeypatch.setattr(source, "sample", lambda i, *rest: calls.append(i) or original(i, *rest))
    prepare_folder(tmp_path, fingerprint(sd, source, SIZE))
    bad = BadSamples(10, [], 0.5)
    build(tmp_path, source, sd, bad, SIZE, rank=1, world_size=2)
    assert calls == [4, 5, 6, 7]
    (tmp_path / ".000000.safetensors.1.tmp").mkdir()  # of a run that was killed
    build(tmp_path, source, sd, bad, SIZE)
    assert calls == [4, 5, 6, 7, 0, 1, 2, 3, 8, 9] and len(LatentCache(tmp_path, source, SIZE)) == 10


def test_workers_change_no_bit_and_batches_no_more_than_rounding(tmp_path):
    """Each with networks of its own: packed weights remember the shape that came first."""
    source, shards, hints = WorldSource("people", SIZE, 7), [], []
    for name, workers, side in (("alone", 0, 64), ("workers", 2, 64), ("one by one", 1, 1024)):
        folder = tmp_path / name
        prepare_folder(folder, {})
        build(folder, source, with_packed_encoders(small_sd()), BadSamples(7, [], 0.5), (side, side), workers)
        shards.append([load_file(path) for path in sorted(folder.glob("*.safetensors"))])
        hints.append([path.read_bytes() for path in sorted((folder / "hints").iterdir())])
    assert [shard["index"].tolist() for shard in shards[0]] == [[0, 1, 2, 3], [4, 5, 6]]
    assert len(hints[0]) == 7 and hints[0] == hints[1] == hints[2]
    for alone, by_workers, one_by_one in zip(*shards, strict=True):
        for name, tensor in alone.items():
            assert torch.equal(tensor, by_workers[name])
            torch.testing.assert_close(tensor, one_by_one[name], rtol=1e-3, atol=1e-3)


def test_batches_of_the_cache_depend_on_the_size_alone():
    sizes = [(64, 64), (512, 512), (512, 768), (2048, 2048)]
    assert [encoding_batch(size) for size in sizes] == [256, 4, 2, 1]


def test_workers_that_are_spawned_open_the_files_again(sd, tmp_path):
    """Pickled tensors would be copies of the whole cache."""
    cache = built(tmp_path, WorldSource("fill50k", SIZE, 6), sd)
    pickled = pickle.dumps(cache)
    assert len(pickled) < len(pickle.dumps(cache.source)) + 500
    (mean, *_), hint = pickle.loads(pickled).read(4, 0)
    assert torch.equal(mean, cache.read(4, 0)[0].mean) and torch.equal(hint, cache.read(4, 0)[1])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_rows_are_mapped_not_read(sd, tmp_path):
    cache = built(tmp_path, WorldSource("fill50k", SIZE, 4), sd)
    assert len(cache) == 4 and str(tmp_path / "000000.safetensors") in Path("/proc/self/maps").read_text()


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


@pytest.mark.parametrize("change", ["base", "text", "seed", "world", "count", "size", "dtype"])
def test_a_stale_cache_is_refused(sd, tmp_path, change):
    source = WorldSource("fill50k", SIZE, 4)
    before = fingerprint(sd, source, SIZE)
    prepare_folder(tmp_path, before)
    prepare_folder(tmp_path, fingerprint(small_sd(), source, SIZE))  # the same again is welcome
    other, others, size = small_sd(), source, SIZE
    if change in ("base", "text"):
        torch.nn.init.zeros_((other.vae.quant_conv if change == "base" else other.text_encoder.final_norm).bias)
        parameter = (other.vae.quant_conv if change == "base" else other.text_encoder.final_norm).weight
        with torch.no_grad():
            parameter.flatten()[-1] += 1e-3
    elif change == "dtype":
        other = other.half()
    elif change == "size":
        size = (64, 128)
    else:
        name, count, seed = (
            ("shapes" if change == "world" else "fill50k"),
            3 + (change != "count"),
            int(change == "seed"),
        )
        others = WorldSource(name, SIZE, count, seed)
    with pytest.raises(ValueError, match="other data or another base") as caught:
        prepare_folder(tmp_path, fingerprint(other, others, size))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(sd, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="something else"):
        prepare_folder(tmp_path, {})


def test_hidden_files_are_nothing_else(tmp_path):
    """Also those of a process that was killed before cache.json had its name."""
    (tmp_path / ".DS_Store").touch()
    (tmp_path / ".cache.json.123.tmp").mkdir()
    prepare_folder(tmp_path, {"a": 1})
    assert (tmp_path / "cache.json").read_text() == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize("card", [b"{", b"[1]", b"\xff", b"[" * 100_000, None])
def test_a_damaged_card_is_named(tmp_path, card):
    path = tmp_path / "cache.json"
    path.mkdir() if card is None else path.write_bytes(card)
    with pytest.raises(ValueError, match="cache.json.*remove the folder"):
        prepare_folder(tmp_path, {})


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
    path, other = tmp_path / "000000.safetensors", tmp_path / "000004.safetensors"
    before, kept = safetensors.torch.load(path.read_bytes()), other.stat().st_mtime_ns
    damage(path)
    built(tmp_path, source, sd)
    after = load_file(path)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert other.stat().st_mtime_ns == kept
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 1 and all(line == f'"{path}" is damaged: it is computed again' for line in said)


@pytest.mark.parametrize("damage", ["lost", "gray", "small", "palette", "foreign"])
def test_a_cached_hint_that_is_none_is_computed_again(sd, tmp_path, damage):
    source = WorldSource("fill50k", SIZE, 3)
    cache = built(tmp_path, source, sd)
    path = tmp_path / "hints" / "000001.png"
    if damage == "lost":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(b"no image")
    else:
        image = Image.open(path)
        {"gray": image.convert("L"), "small": image.resize((32, 32)), "palette": image.quantize()}[damage].save(path)
    assert np.array_equal(cache.hint(1), source.sample(1).hint)
    assert torch.equal(cache.read(1, 0)[1], to_hints([source.sample(1).hint])[0])
