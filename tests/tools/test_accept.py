"""tools.accept: it runs as a whole, what is broken is seen, and what only CUDA runs is called as it is declared."""

import gc
import json
import subprocess
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import create_autospec

import forked
import pytest
import torch

import infer
from controlnet.training.options import parse_args
from ldm.unet import UNetDecoder, UNetEncoder
from tools import accept, bench
from tools.acceptance import compared, device, exact, figures, job, programs
from tools.acceptance.report import Report

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TRAININGS, FEATURES = programs.TRAININGS, programs.FEATURES
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models that the tests share, and the reference once the first has asked for it."""
    device.settle(CPU)  # imports a part of PyTorch, in which no stage is to run out of time
    return tmp_path_factory.mktemp("accept")


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """What costs the most time is done once, not in every way."""
    monkeypatch.setattr(programs, "TRAININGS", {"bf16": programs.TRAININGS["bf16"]})
    monkeypatch.setattr(programs, "FEATURES", {"inpainting": programs.FEATURES["inpainting"]})
    few = replace(job.SIZES["tiny"], large=(64,), batches=(1,))
    monkeypatch.setitem(job.SIZES, "tiny", few)
    monkeypatch.setattr(programs, "resumed", resumed_with_deterministic)
    monkeypatch.setattr(exact, "FORWARD", {"fp32": 2e-5, "bf16": 4e-2})
    monkeypatch.setattr(device, "WARM_UPS", 1)
    monkeypatch.setattr(job, "multiprocessing", SimpleNamespace(get_context=lambda how: forked.CONTEXT))
    monkeypatch.setattr(gc, "collect", lambda: 0)  # all that the suite holds is gone through
    monkeypatch.setattr(bench, "have_peers", lambda: False)
    monkeypatch.setattr(programs, "subprocess", SimpleNamespace(run=train_in_no_time))


real_resumed = programs.resumed


def resumed_with_deterministic(job, report, runs, how):
    return real_resumed(job, report, runs, how) if "--deterministic" in how else 0.0


def train_in_no_time(command, **_):
    """In place of a process."""
    assert command[1] == "train.py"
    given = parse_args("", command[2:])
    given["out"].mkdir()
    (given["out"] / "log.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1, "validation_loss": 0.2}\n')
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def run(folder, tmp_path):
    """-> the exit status and the stages of a call."""

    def run(*arguments, out="accept.json"):
        wanted = ["--device", "cpu", "--size", "tiny", "--out", str(tmp_path / out), "--folder", str(folder)]
        status = accept.main([*wanted, "--minutes", "60", *arguments])
        return status, json.loads((tmp_path / out).read_text())["stages"]

    return run


def rows(stage):
    return {row["what"]: row for row in stage["rows"]}


# -------------------------------------------------------------------------------------------------------- the whole


def test_the_whole_program(run, tmp_path):
    status, stages = run()
    assert status == 0 and list(stages) == list(accept.STAGES)
    states = {name: stage["state"] for name, stage in stages.items()}
    assert {name for name, state in states.items() if state != "done"} == {"out_of_memory"}, states
    for stage, what in {
        "machine": "bf16 product of 256x256, TFLOP/s",
        "training": "--deterministic: one after a SIGTERM",
        "forward": "eps at t = 981, cfg 7.5, bf16",
        "step": "cosine of all gradients, bf16",
        "infer": "inpainting: --again is equal",
        "peers": "a training step, batch 1, latents before: ours, GB",
        "memory": "batch 1, checkpointing, accumulate 2: predicted in all, GB",
        "profile": "a training step: attention without a fused kernel",
        "fill50k": "at its end: validation_loss",
    }.items():
        assert what in rows(stages[stage]), stage
    assert all(row["held"] for stage in stages.values() for row in stage["rows"] if row["kind"] == "must")
    assert rows(stages["step"])["gradients"]["value"] == 110
    table = (tmp_path / "accept.md").read_text()
    assert "| | text, fp32 | 0 | must <= 2e-05 | holds |" in table
    assert "| **out_of_memory** | only a GPU's memory can be limited |" in table


def test_what_was_computed_in_the_background_is_not_computed_again(tmp_path, monkeypatch):
    started = []

    def process(target, args, daemon):
        return SimpleNamespace(start=lambda: started.append(args[1]))

    monkeypatch.setattr(job.multiprocessing, "get_context", lambda how: SimpleNamespace(Process=process))
    (tmp_path / "control").mkdir()  # the models are there
    for files in ([], ["predictions.json"], ["reference.safetensors"]):
        for file in files:
            (tmp_path / file).touch()
        job.Job(CPU, job.SIZES["tiny"], tmp_path).begin_in_background()
    assert started == ["write_reference", "write_predictions", "write_reference"]


def test_options_of_the_programs_are_theirs():
    for how in TRAININGS.values():
        assert parse_args("", how)
    for how in FEATURES.values():
        assert infer.parse_args(how) is not None


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_a_wrong_network_is_seen(run, monkeypatch):
    """A UNet whose output is 1 % too large: the exit status is 1, and what is right stays so."""
    monkeypatch.setattr(exact, "FORWARD", {"fp32": 2e-5})
    monkeypatch.setattr(exact, "pictures", lambda job, precision: torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    forward = UNetDecoder.output
    monkeypatch.setattr(UNetDecoder, "output", lambda self, x: 1.01 * forward(self, x))
    status, stages = run("--only", "forward")
    found = rows(stages["forward"])
    assert status == 1 and not found["eps at t = 501, cfg 7.5, fp32"]["held"]
    assert found["eps at t = 501, cfg 7.5, fp32"]["value"] == pytest.approx(0.01, rel=0.01)
    assert found["VAE, decoding, fp32"]["held"]


def test_a_stage_that_fails_is_recorded_and_the_others_go_on(run, monkeypatch):
    monkeypatch.setattr(figures, "profile", lambda job, report: 1 / 0)
    status, stages = run("--only", "machine,profile,fill50k")
    assert status == 1 and [stage["state"] for stage in stages.values()] == ["done", "failed", "done"]
    assert stages["profile"]["why"] == "ZeroDivisionError: division by zero"


def test_what_is_out_of_time_is_not_passed(run, monkeypatch):
    def endless(job, report):
        report.must("before", 1, most=1)
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(figures, "machine", endless)
    monkeypatch.setattr(exact, "weights", lambda job, report: None)
    status, stages = run("--only", "machine,weights", "--minutes", "0.05")
    assert stages["weights"]["state"] == "done"  # it was left its share
    assert status == 1 and stages["machine"]["state"] == "not run" and rows(stages["machine"])["before"]["held"]
    status, stages = run("--only", "machine", "--minutes", "1e-9", out="other.json")
    assert status == 1 and stages["machine"]["why"] == "no time was left"


def test_who_stops_it_is_told_what_holds_the_results(run, capsys, tmp_path, monkeypatch):
    def stop(job, report):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "machine", stop)
    assert run("--only", "machine")[0] == 130
    assert capsys.readouterr().err.endswith(f"accept: stopped, {tmp_path / 'accept.json'} holds what was found\n")


def test_later_calls_add_to_the_file(run, capsys, tmp_path):
    assert run("--only", "machine")[0] == 0
    status, stages = run("--only", "weights")
    assert status == 0 and list(stages) == ["machine", "weights"]
    (tmp_path / "accept.json").write_text('{"device": "cuda", "size": "full", "stages": {}}')
    arguments = ["--device", "cpu", "--size", "tiny", "--out", str(tmp_path / "accept.json")]
    assert accept.main(arguments) == 2
    assert "holds results of another run" in capsys.readouterr().err


def test_mistakes_are_sentences(tmp_path, capsys):
    assert accept.main(["--device", "cuda:99", "--out", str(tmp_path / "a.json")]) == 2
    assert accept.main(["--device", "cpu", "--out", str(tmp_path / "no folder" / "a.json")]) == 2
    for name, content in (("a.md", "# mine"), ("a.json", "# mine")):
        (tmp_path / name).write_text(content)
        assert accept.main(["--device", "cpu", "--out", str(tmp_path / name)]) == 2
        assert (tmp_path / name).read_text() == content
    said = capsys.readouterr().err
    assert "let it end in .json" in said and "holds no results of this program" in said
    with pytest.raises(SystemExit) as stop:
        accept.main(["--only", "forwards", "--out", "a.json"])
    assert stop.value.code == 2 and 'there is no stage "forwards"' in capsys.readouterr().err


@pytest.mark.parametrize("value, held", [(1e-3, True), (2e-3, False), (float("nan"), False), (float("inf"), False)])
def test_what_must_hold(tmp_path, value, held):
    report = Report(tmp_path / "a.json", device="cpu", size="tiny")
    report.begin("machine")
    report.must("it", value, most=1e-3)
    report.aim("an aim", 0.5, least=1.0)
    report.end("machine", "done")
    assert report.broken() == ([] if held else ["machine: it"])
    assert json.loads((tmp_path / "a.json").read_text()) == report.values
    assert ("holds" if held else "**BROKEN**") in report.markdown() and "| aim >= 1 | missed |" in report.markdown()


# ----------------------------------------------------------------------------------------------------- what is compared


def test_errors_and_angles():
    ones = torch.ones(4)
    assert (
        exact.relative(1.01 * ones, ones) == pytest.approx(0.01, rel=1e-4) and exact.relative(0 * ones, 0 * ones) == 0
    )
    assert exact.relative(ones / 0, ones) == exact.relative(ones[:2], ones) == float("inf")
    pair = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
    assert exact.cosine_of(pair, [3 * x for x in pair]) == pytest.approx(1)
    assert exact.cosine_of(pair, [torch.tensor([0.0, 1.0]), torch.tensor([0.0])]) == 0


def test_side_by_side_with_diffusers(folder, tmp_path, monkeypatch):
    """Aims are recorded, both ways of training are ours alone, and neither side loses its memory in the other's."""
    monkeypatch.setattr(bench, "have_peers", lambda: True)
    sides = {
        name: figures.Side({"1 image": list}, {"1 image": size}) for name, size in (("ours", 1e9), ("diffusers", 2e9))
    }
    seconds = iter([2.0, 5.0])
    monkeypatch.setattr(figures, "timed", lambda work, where: (next(seconds), None))
    report = Report(tmp_path / "a.json", device="cpu", size="tiny")
    report.begin("peers")
    figures.compare(job.Job(CPU, job.SIZES["tiny"], folder), report, sides, "")
    assert [(row["value"], row["limit"]) for row in report.rows if row["kind"] == "aim"] == [
        (2.5, ">= 1.5"),
        (0.5, "<= 0.8"),
    ]


# ------------------------------------------------------------------------------------------- what only CUDA ever runs


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's functions as they are declared: calls are recorded, and wrong arguments raise."""
    values = {
        "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "set_sync_debug_mode": None,
        "set_per_process_memory_fraction": None, "set_device": None, "memory_allocated": 5, "max_memory_allocated": 7,
        "max_memory_reserved": 9, "mem_get_info": (1e9, 80e9), "get_device_name": "H100",
        "get_device_capability": (9, 0),
    }  # fmt: skip
    fakes = {name: create_autospec(getattr(torch.cuda, name), return_value=value) for name, value in values.items()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return fakes


def test_time_is_taken_once_all_is_done(cuda):
    calls = []
    cuda["synchronize"].side_effect = lambda device: calls.append("wait")
    assert device.median_seconds(lambda: calls.append("work"), CUDA, runs=2) > 0
    assert calls == ["work", *2 * ["wait", "work", "wait"]]


def test_memory_of_cuda(cuda):
    assert device.allocated(CUDA) == 5 and device.with_peaks(list, CUDA) == ([], 7, 9)
    cuda["reset_peak_memory_stats"].assert_called_once()
    with pytest.raises(ZeroDivisionError), device.little_memory(CUDA, 0.08):
        raise ZeroDivisionError
    assert [call.args for call in cuda["set_per_process_memory_fraction"].call_args_list] == [(0.08, CUDA), (1.0, CUDA)]
    device.settle(CUDA)
    described = device.describe(CUDA)
    assert described["device"] == "H100" and described["memory, GB"] == 80 and described["compute capability"] == "9.0"


def test_waits_of_cuda(cuda):
    def work():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    places = device.waits(work, CUDA)
    assert len(places) == 2 and all("test_accept.py:" in place for place in places)
    assert [call.args for call in cuda["set_sync_debug_mode"].call_args_list] == [("warn",), ("default",)]


def test_profile_of_cuda(cuda):
    """Without a GPU there are no kernels, but the same fields."""
    events = device.profiled(lambda: torch.ones(8) @ torch.ones(8), CUDA)
    assert any(name == "aten::dot" for name, _, _ in events) and cuda["synchronize"].called


@pytest.mark.parametrize("name, found", [("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_job_on_cuda_takes_the_device(cuda, monkeypatch, name, found):
    """By its number: torch.cuda.set_device and set_per_process_memory_fraction refuse any other."""
    monkeypatch.setattr(job, "pick_device", torch.device)
    with job.job(name, "full", None) as work:
        assert work.folder.is_dir() and work.setup().device == found and work.setup().precision == "fp16"
    cuda["set_device"].assert_called_once_with(torch.device(found))


def test_out_of_memory(run, monkeypatch):
    """As on a GPU: both programs say so with status 2, and the run goes on afterwards."""

    @contextmanager
    def little(where, fraction):
        def full(self, x, t, context):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        with monkeypatch.context() as patch:
            patch.setattr(UNetEncoder, "forward", full)  # first of all: the batch is large
            yield

    monkeypatch.setattr(programs, "little_memory", little)
    status, stages = run("--only", "out_of_memory")
    found = rows(stages["out_of_memory"])
    assert status == 0, found
    assert found["infer.py says so"]["held"] and found["train.py out of memory: exit status"]["value"] == 2
    assert found["half-written files"]["held"] and found["resumed after it: exit status"]["held"]


def test_a_late_signal_does_nothing(tmp_path):
    """The run that it is for may be over."""
    with programs.signal_after(tmp_path / "log"):
        (tmp_path / "log").write_text("a line\n")
        time.sleep(0.05)


def test_predictions_are_for_every_case():
    names = list(compared.cases(job.SIZES["full"]))
    assert len(names) == 12 and names[-1] == "batch 16, checkpointing, accumulate 2"
