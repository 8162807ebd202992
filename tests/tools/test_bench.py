"""tools.bench: both sides do the same work, a wrong output is seen, and the table says who is faster."""

import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALLEST, small_control, small_sd
from torch import nn

import infer
from tools import bench, bench_case, bench_ours
from tools.bench_case import Measurement, Setup, to_numpy
from tools.paper.cost import count_flops

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
COMPARED = [row for row in bench.ROWS if row.own is None]
SIZES = {"size": 64, "steps": 2, "cfg": 3.0, "batch_size": 2, "checkpointing": False}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sd = small_sd(SMALLEST)
    bench_ours.write_models(folder, sd, small_control(sd))
    return SIZES | {"folder": folder, "device": "cpu", "precision": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def peers():
    os.environ.update(bench.QUIET)
    for package in ("diffusers", "transformers"):
        pytest.importorskip(package, reason="tests/requirements-interop.txt is not installed")
    from tools import bench_peers

    return bench_peers


def outputs(work):
    result = work()
    return {name: to_numpy(value) for name, value in (result() if callable(result) else result).items()}


# ---------------------------------------------------------------------------------------------------------- both sides


@pytest.mark.parametrize("row", COMPARED, ids=lambda row: "-".join([row.task, *map(str, row.arguments.values())]))
def test_both_sides_give_the_same(setup, peers, row):
    """Of training two steps: the second is that of weights which both have changed alike."""
    ours, theirs = (getattr(side, row.task)(Setup(**setup), **row.arguments) for side in (bench_ours, peers))
    for _ in range(2):
        assert bench.difference(outputs(ours), outputs(theirs)) < bench.ROUNDING["fp32"]


def test_models_whose_writing_was_stopped_are_written_to_the_end(tmp_path, monkeypatch):
    sd = small_sd(SMALLEST)
    control = small_control(sd)

    def save(*_, layout="ldm"):
        if layout == "diffusers":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(control, "save", save)
        bench_ours.write_models(tmp_path, sd, control)
    bench_ours.write_models(tmp_path, sd, control)
    assert all((tmp_path / name).exists() for name in ("control", "control.safetensors", "base", "base.safetensors"))


def test_the_cached_step_does_less_and_training_trains(setup):
    """Without the encoders' arithmetic; and the loss of the same batch falls from step to step."""
    cached, uncached = (bench_ours.training(Setup(**setup), cached) for cached in (True, False))
    assert count_flops(cached) < count_flops(uncached)
    assert outputs(cached)["loss"] > outputs(cached)["loss"]


def test_only_their_controlnet_is_under_autocast(setup, peers, monkeypatch, tmp_path):
    """As in their script: locked networks compute in half precision by themselves, and what is trained is in fp32,
    although the files are stored the other way round."""
    seen, half, sd = {}, torch.bfloat16, small_sd(SMALLEST)
    sd.save(tmp_path / "base", layout="diffusers")
    small_control(sd).save(tmp_path / "control", half, layout="diffusers")
    for name, method in {
        "ControlNetModel": "forward",
        "UNet2DConditionModel": "forward",
        "AutoencoderKL": "encode",
        "CLIPTextModel": "forward",
    }.items():
        model = getattr(peers, name)
        original = getattr(model, method)

        def called(self, x, *args, _name=name, _called=original, **kwargs):
            seen[_name] = torch.is_autocast_enabled("cpu"), next(self.parameters()).dtype, x.dtype
            return _called(self, x, *args, **kwargs)

        monkeypatch.setattr(model, method, called)
    peers.training(Setup(**setup | {"precision": "bf16", "folder": tmp_path}), cached=False)()
    assert seen == {
        "ControlNetModel": (True, torch.float32, half),
        "UNet2DConditionModel": (False, half, half),
        "AutoencoderKL": (False, half, half),
        "CLIPTextModel": (False, half, torch.int64),
    }


@pytest.mark.parametrize("device, steps", [("cpu", 4), ("cuda:0", 20)])
def test_a_gpu_is_given_more_steps(monkeypatch, device, steps):
    """Else what is done once would rule."""
    seen = {}
    machine = {"device": device, "threads": 1, "precision": "fp32"}
    monkeypatch.setattr(bench, "in_a_process", lambda *_: (machine, "a machine"))
    monkeypatch.setattr(bench, "report", lambda rows, setup, rounds: seen.update(setup) or 0)
    assert bench.main(["--case", "sd15-512", "--device", device]) == 0 and seen["steps"] == steps


def test_reuse_is_beside_images_in_full(setup, monkeypatch):
    """One image of two datasets with the models that ship, in two steps, of which the second is approximate."""
    monkeypatch.setattr(bench_ours, "SAMPLES", 1)
    monkeypatch.setattr(bench_ours, "TINY_CONTROL_OF", {"fill50k": "tiny-fill50k", "people": "tiny-pose"})
    full, reused = (outputs(bench_ours.reuse(Setup(**setup), every))["images"] for every in (1, 2))
    assert full.shape == (2, 128, 128, 3)
    assert 10 < bench.psnr(reused, full) < 60
    assert bench.psnr(full, full) == math.inf
    assert bench.psnr(full * 0, full * 0 + 255) == 0


def test_random_weights_show_every_input():
    """The hint in the image, through zero convolutions that are not zero."""
    sd = small_sd(SMALLEST)
    sd, control = bench_ours.fill(sd), bench_ours.fill(small_control(sd))
    strong = bench_ours.sample(sd, control, 64, 2, 3.0)["latents"]
    for conv in (*control.zero_convs, control.middle_zero_conv):
        nn.init.zeros_(conv.weight)
    without = bench_ours.sample(sd, control, 64, 2, 3.0)["latents"]
    assert bench.relative(to_numpy(strong), to_numpy(without)) > 1e-2


# ----------------------------------------------------------------------------------------------------------- measuring


def hundred_megabytes(setup):
    """A task that needs 200 MB before its work and 100 MB for it."""
    torch.ones(50_000_000)

    def work():
        return {"sum": torch.ones(25_000_000).sum()}

    return work


def measure_hundred_megabytes(setup):
    bench_ours.hundred_megabytes = hundred_megabytes
    bench_case.LONG_ENOUGH = math.inf  # a busy machine is given as many runs
    return bench_case.measure("bench_ours", "hundred_megabytes", {}, setup, cold=False)


def test_memory_is_that_of_the_work(setup):
    with ProcessPoolExecutor(1, forked.CONTEXT) as pool:
        measured = pool.submit(measure_hundred_megabytes, setup).result()
    assert measured.outputs["sum"] == 25_000_000 and len(measured.seconds) == bench_case.MOST_RUNS
    assert 0.9e8 < measured.memory < 1.3e8


def test_sides_take_turns_and_medians_are_compared(setup, monkeypatch):
    """The order alternates."""
    asked = []
    times = {"bench_ours": iter([1, 9, 2]), "bench_peers": iter([4, 5, 60])}

    def measured(what, module, function, side, task, arguments, setup, cold):
        asked.append(side)
        seconds = next(times[side])
        return Measurement([seconds, seconds], 1e9 * len(asked), {"x": np.ones(4) + (side == "bench_ours") / 100})

    monkeypatch.setattr(bench, "in_a_process", measured)
    monkeypatch.setattr(bench, "have_peers", lambda: True)
    line, difference = bench.compared(bench.Row("sampling", "{steps} steps"), setup, 3)
    ours, theirs = "bench_ours", "bench_peers"
    assert asked == [ours, theirs, theirs, ours, ours, theirs]
    assert line == ["2 steps", "2 s", "5 s", "2.50", "5.00 GB", "6.00 GB", "0.83", "1.0e-02"]
    assert difference == pytest.approx(0.01)


def test_differences_that_are_none_and_that_cannot_be_told():
    ones = np.ones(4, np.float32)
    assert math.isnan(bench.difference({}, {}))
    assert bench.difference({"x": ones}, {"x": ones}) == 0
    assert bench.difference({"x": 1.01 * ones, "y": ones}, {"x": ones, "y": ones}) == pytest.approx(0.01, rel=1e-4)
    assert bench.difference({"x": ones * math.nan}, {"x": ones}) == math.inf
    assert bench.difference({"x": ones[None]}, {"x": ones}) == math.inf
    image = np.full(4, 100, np.uint8)
    assert bench.difference({"x": image + 1}, {"x": image}) == 0
    assert bench.difference({"x": image - 3}, {"x": image}) == pytest.approx(0.02)


# ----------------------------------------------------------------------------------------------------------- the table


def test_twice_as_fast_in_half_the_memory():
    cells = bench.cells("x", [0.5, 1.0], [1e9, 2e9], 1e-6)
    assert cells == ["x", "0.5 s", "1 s", "2.00", "1.00 GB", "2.00 GB", "0.50", "1.0e-06"]
    assert len(cells) == len(bench.COLUMNS)
    assert bench.cells("x", [0.5], [math.nan], math.nan) == ["x", "0.5 s", *[""] * 6]


@pytest.mark.parametrize("difference, status", [(math.nan, 0), (9e-5, 0), (2e-4, 1), (math.inf, 1)])
def test_the_exit_status(setup, monkeypatch, capsys, difference, status):
    monkeypatch.setattr(bench, "compared", lambda *_: (["the row", *[""] * 7], difference))
    assert bench.report(bench.ROWS[:1], setup, 1) == status
    assert ("differ by more than rounding, 0.0001: the row" in capsys.readouterr().err) == bool(status)


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(bench, "in_a_process", lambda what, *call: bench.call(*call))
    monkeypatch.setattr(bench_case, "MOST_RUNS", 1)


def test_a_wrong_answer_is_seen(setup, peers, in_this_process, tmp_path, capsys):
    """Diffusers' ControlNet is changed by a hundredth in one layer: the exit status is 1, and the row is named."""
    shutil.copytree(setup["folder"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "control" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    tensors["controlnet_mid_block.weight"] *= 1.01
    save_file(tensors, file)
    assert bench.report(bench.ROWS[:1], setup | {"folder": tmp_path}, 1) == 1
    out, err = capsys.readouterr()
    assert "an image of 64x64, 2 steps" in out and "differ by more than rounding, 0.0001: an image of 64x64" in err


def test_without_diffusers_ours_is_measured_alone(setup, in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(bench, "have_peers", lambda: False)
    (row,) = (row for row in bench.ROWS if row.task == "loading")
    assert bench.report([row], setup, 1) == 0
    out, err = capsys.readouterr()
    cells = [cell.strip() for cell in out.splitlines()[-1].split("|")[1:-1]]
    assert cells[0] == "loading base and ControlNet" and cells[1].endswith(" s") and not any(cells[2:4] + cells[5:])
    assert "pip install -r tests/requirements-interop.txt" in err


# ----------------------------------------------------------------------------------------------------------- processes


def test_the_start_of_infer_makes_an_image(setup, monkeypatch):
    def here(command, **_):
        assert command[:2] == [sys.executable, str(bench_ours.ROOT / "infer.py")]
        return subprocess.CompletedProcess(command, infer.main(command[2:]), "", "")

    monkeypatch.setattr(bench_ours, "subprocess", SimpleNamespace(run=here))
    assert bench_ours.start(Setup(**setup), infer=True)() == {} and (setup["folder"] / "start.png").exists()


def test_a_process_that_fails_is_a_sentence(monkeypatch, capfd):
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda how: forked.CONTEXT)  # which starts sooner
    with pytest.raises(ValueError, match="the task failed with AttributeError: .* has no attribute 'nothing'"):
        bench.in_a_process("the task", "cli", "nothing")
    assert bench.main(["--device", "cuda:99"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith('bench: PyTorch finds no device "cuda:99"')


def test_a_processor_is_called_by_its_name(monkeypatch, tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text(
        "processor\t: 0\nmodel name\t: A Fast One\nflags\t: fpu\nprocessor\t: 1\nmodel name\t: A Fast One\n"
    )
    monkeypatch.setattr(bench_case, "Path", lambda _: told)
    assert bench_case.name_of(torch.device("cpu")) == "A Fast One"
    told.unlink()  # as outside Linux
    monkeypatch.setattr(bench_case.platform, "processor", lambda: "")
    assert bench_case.name_of(torch.device("cpu")) == "CPU" and bench_case.name_of(torch.device("meta")) == "meta"
