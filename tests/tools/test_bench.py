"""tools.bench: both sides do the same work, a wrong output is seen, and the table says who is faster."""

import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_control, small_sd
from torch import nn

from ldm.blocks import Upsample
from ldm.fast.packed import pack
from tools import bench, bench_ours
from tools.bench import Row, Took
from tools.bench_processes import Anew, Case, Measurement, Setup, Worker, as_numpy, counted, in_turns

# The tasks by their names here and there.
TASKS = {
    "sampling": "sampling",
    "vae_encode": "vae_encode",
    "vae_encode_in_strips": "vae_encode",
    "vae_decode": "vae_decode",
    "vae_decode_in_strips": "vae_decode",
    "training_cached": "training",
    "training_uncached": "training",
    "loading": "loading",
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sd = small_sd()
    bench_ours.write_models(folder, sd, small_control(sd))
    return Setup(Case(size=64, steps=2, cfg=3.0, batch_size=2), folder, "cpu", "fp32", 1)


@pytest.fixture(scope="module")
def peers():
    os.environ.update(bench.QUIET)
    for package in ("diffusers", "transformers"):
        pytest.importorskip(package, reason="tests/requirements-interop.txt is not installed")
    from tools import bench_peers

    return bench_peers


def outputs(work):
    return {name: as_numpy(value) for name, value in work()().items()}


# ---------------------------------------------------------------------------------------------------------- both sides


@pytest.mark.parametrize("name", TASKS)
def test_both_sides_give_the_same(setup, peers, name):
    """Of training two steps: the second is that of weights which both have changed alike."""
    ours, theirs = getattr(bench_ours, name)(setup), getattr(peers, TASKS[name])(setup)
    for _ in range(2):
        assert bench.difference(outputs(ours), outputs(theirs)) < bench.ROUNDING["fp32"]


def test_a_wrong_answer_is_seen(setup, peers, tmp_path, capsys):
    """Diffusers' ControlNet is changed by a hundredth in one layer: the exit status is 1, and the row is named."""
    sd = small_sd()
    bench_ours.write_models(tmp_path, sd, small_control(sd))
    file = tmp_path / "control" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    tensors["controlnet_mid_block.weight"] *= 1.01
    save_file(tensors, file)
    changed = Setup(setup.case, tmp_path, "cpu", "fp32", 1)
    assert bench.report(changed, ["sampling"], rounds=1) == 1
    out, err = capsys.readouterr()
    assert "a picture of 64x64, 2 steps" in out and "differ by more than rounding, 0.0001: a picture of 64x64" in err


def test_the_encoded_step_does_less_and_training_trains(setup):
    """Without the encoders' arithmetic; and the loss of the same batch falls from step to step."""
    cached, uncached = bench_ours.training_cached(setup), bench_ours.training_uncached(setup)
    assert counted(cached) < counted(uncached)
    assert outputs(cached)["loss"] > outputs(cached)["loss"]


@torch.no_grad()
def test_packed_weights_count_as_much_as_plain_ones():
    """But for upsampling, which then needs four of nine products."""
    sd, x = small_sd(), torch.randn(2, 4, 8, 8)
    encoder, upsample = nn.Sequential(sd.vae.encoder), nn.Sequential(Upsample(4))
    images = torch.randn(1, 3, 64, 64)
    plain, doubled = counted(lambda: encoder(images)), counted(lambda: upsample(x))
    pack(encoder, upsample)
    upsample(x)  # adds up weights, once
    assert counted(lambda: encoder(images)) == plain > 1e6
    assert counted(lambda: upsample(x)) * 9 == doubled * 4 > 1e4


def test_reuse_is_beside_pictures_in_full(setup, monkeypatch):
    """One picture of each world with the models that ship, in two steps, of which the second is approximate."""
    monkeypatch.setattr(bench_ours, "SAMPLES", 1)
    case = Case(size=128, steps=2, cfg=2.5, batch_size=1)
    setup = Setup(case, setup.folder, "cpu", "fp32", 1)
    full, reused = (
        outputs(task(setup))["pictures"] for task in (bench_ours.sampling_in_full, bench_ours.sampling_with_reuse)
    )
    assert full.shape == (3, 128, 128, 3)
    assert 10 < bench.decibels(reused, full) < 60
    assert bench.decibels(full, full) == math.inf
    assert bench.decibels(full * 0, full * 0 + 255) == 0


def test_filled_weights_show_every_input():
    """The hint in the picture, through zero convolutions that are not zero."""
    sd = small_sd()
    sd, control = bench_ours.fill(sd), bench_ours.fill(small_control(sd))
    strong = bench_ours.picture(sd, control, 64, 2, 3.0)()["latents"]
    for conv in (*control.zero_convs, control.middle_zero_conv):
        torch.nn.init.zeros_(conv.weight)
    assert bench.relative(as_numpy(strong), as_numpy(bench_ours.picture(sd, control, 64, 2, 3.0)()["latents"])) > 1e-2


# ----------------------------------------------------------------------------------------------------------- measuring


class Listed:
    """Gives one time after the other, and writes down when it was asked."""

    def __init__(self, name, seconds, asked):
        self.name, self.seconds, self.asked = name, iter(seconds), asked

    def measure(self):
        self.asked.append(self.name)
        return Measurement(next(self.seconds), 1.0, {})


def test_sides_are_measured_in_turns_and_their_medians_taken():
    asked = []
    sides = in_turns([Listed("ours", [1, 9, 2], asked), Listed("theirs", [4, 5, 60], asked)], 3)
    assert asked == ["ours", "theirs"] * 3
    row = bench.row("x", sides, [math.nan, math.nan])
    assert (row.ours.seconds, row.theirs.seconds, row.difference) == (2, 5, None)


def test_a_side_that_is_alone_is_warm_and_counted(setup):
    """Its process is new in each round; the arithmetic is that of one that stays."""
    alone, staying = (bench.working_row("x", [bench_ours.vae_decode], setup, 2, alone) for alone in (True, False))
    assert 0 < alone.ours.gemm_share < 2 and 0 < staying.ours.gemm_share < 2
    cold, warm = Anew(bench_ours.vae_decode, setup), Anew(bench_ours.vae_decode, setup, warm=True)
    cold.measure(), warm.measure()
    work = bench_ours.vae_decode(setup)
    work()  # the first one packs weights, which is arithmetic, too
    assert cold.count() == 0 and warm.count() == counted(work) > 1e6


def test_differences_that_are_none_and_that_cannot_be_told():
    ones = np.ones(4, np.float32)
    assert bench.difference({}, {}) is None
    assert bench.difference({"x": ones}, {"x": ones}) == 0
    assert bench.difference({"x": 1.01 * ones, "y": ones}, {"x": ones, "y": ones}) == pytest.approx(0.01, rel=1e-4)
    assert bench.difference({"x": ones * math.nan}, {"x": ones}) == math.inf
    assert bench.difference({"x": ones[None]}, {"x": ones}) == math.inf
    picture = np.full(4, 100, np.uint8)
    assert bench.difference({"x": picture + 1}, {"x": picture}) == 0
    assert bench.difference({"x": picture - 3}, {"x": picture}) == pytest.approx(0.02)


def takes_memory(setup):
    torch.ones(50_000_000)  # 200 MB that are gone before the work

    def work():
        numbers = torch.ones(25_000_000)
        return lambda: {"sum": numbers.sum()}

    return work


def fails(setup):
    raise RuntimeError("no such task")


def test_a_worker_tells_the_memory_of_its_work(setup):
    worker = Worker(takes_memory, setup)
    measured = worker.measure()
    worker.close()
    assert measured.outputs["sum"] == 25_000_000 and measured.seconds > 0
    assert 1.0e8 < measured.memory < 1.3e8


def test_a_worker_that_fails_is_a_sentence(setup, capfd):
    with pytest.raises(ValueError, match="test_bench.fails ended with status 1"):
        Worker(fails, setup).measure()
    assert "no such task" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the table


def test_twice_as_fast_in_half_the_memory():
    cells = bench.cells(Row("x", Took(0.5, 1e9, 0.8), Took(1.0, 2e9, 0.4), 1e-6))
    assert cells == ["x", "0.5 s", "1 s", "2.00", "1.00 GB", "2.00 GB", "0.50", "80%", "40%", "1.0e-06"]
    assert len(cells) == len(bench.COLUMNS)
    assert bench.cells(Row("x", Took(0.5, math.nan))) == ["x", "0.5 s", *[""] * 8]


@pytest.mark.parametrize("difference, status", [(None, 0), (9e-5, 0), (2e-4, 1), (math.inf, 1)])
def test_the_exit_status(setup, monkeypatch, difference, status):
    row = Row("x", Took(1, 1), Took(1, 1), difference)
    monkeypatch.setattr(bench, "rows", lambda *_: iter([row]))
    assert bench.report(setup, bench.SECTIONS, 1) == status


def test_without_diffusers_ours_is_measured_alone(setup, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peer_version", lambda: None)
    rows = list(bench.rows(setup, ["loading"], 1))
    assert [row.theirs for row in rows] == [None] and rows[0].ours.seconds > 0
    assert "pip install -r tests/requirements-interop.txt" in capsys.readouterr().err


def test_the_start_of_infer_is_beside_that_of_torch(setup, monkeypatch):
    monkeypatch.setattr(bench, "peer_version", lambda: None)
    (row,) = bench.rows(setup, ["start"], 1)
    assert row.ours.seconds > 0 and row.theirs.seconds > 0 and (setup.folder / "start.png").exists()
