"""train.py itself, run on a small random base: what it writes, that it resumes exactly, and its errors."""

import json
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import active_children, get_context
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import SMALLEST, small_control, small_sd
from written import write_small_lora

import infer
import train
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from controlnet.training import latent_cache, simulation
from controlnet.training import options as train_options
from controlnet.training.interruptions import Signals
from controlnet.training.lock import locked
from controlnet.training.opening import split
from controlnet.training.options import TrainSettings
from controlnet.training.pairs import Wanted, recognise
from controlnet.training.resolve import open_base_of, resolve
from controlnet.training.run_state import RunFolder
from controlnet.training.validation import ValidationLoss, zero_conv_norms
from ldm import StableDiffusion
from ldm.config import ScheduleConfig

ROOT = Path(__file__).parent.parent
# The time of a short run goes into the building of networks, by the layer: attention is in the middle alone.
ONE_LEVEL = replace(
    SMALLEST, unet=replace(SMALLEST.unet, channels=16, multipliers=(1,), attention=(False,), heads=(2,))
)


@pytest.fixture(scope="module")
def sd():
    """Which tests do not change."""
    return small_sd(ONE_LEVEL)


@pytest.fixture(scope="module")
def base(sd, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    sd.save(path)
    return path


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory):
    """Latents that the runs share: each would compute the same."""
    folder = tmp_path_factory.mktemp("latents")
    assert run(base, tmp_path_factory.mktemp("first"), "--steps", "1", "--cache", str(folder)) == 0
    return ["--cache", str(folder)]


def options(base, out):
    few = ["--images", "8", "--batch-size", "2", "--warmup", "1", "--validation", "0", "--sample-count", "0"]
    return ["--base", str(base), "--out", str(out), *few, "--device", "cpu", "--save-every", "2", "--lr", "1e-3"]


def run(base, out, *arguments: str) -> int:
    return train.main([*options(base, out), *arguments])


@pytest.fixture(scope="module")
def copy_of_run(base, cache, tmp_path_factory):
    """copy_of_run(out, "--steps", "2"): what such a run has left. Each is made once, many tests go on from it."""
    runs = {}

    def copied(out, *arguments):
        if arguments not in runs:
            runs[arguments] = tmp_path_factory.mktemp("run")
            assert run(base, runs[arguments], *arguments, *cache) == 0
        shutil.copytree(runs[arguments], out, dirs_exist_ok=True)

    return copied


def resume(out, *arguments: str) -> int:
    """With the run's own settings: nothing of `options` is said again."""
    return train.main(["--resume", "--out", str(out), "--device", "cpu", *arguments])


def stopped_after(step, run, out):
    """What `run` would have left if it had been killed after the save of this step."""
    shutil.copytree(run, out)
    for state in (out / "state").iterdir():
        if int(state.stem) > step:
            state.unlink()


def control_of(out):
    return load_file(out / "control.safetensors")


def assert_same_run(a, b):
    """Weights, optimizer, scaler, rate, average and position to the last bit, and what was logged of each step."""
    assert_equal(control_of(a), control_of(b))
    assert_equal(newest_state(a), newest_state(b))
    assert steps_of(a) == steps_of(b)


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def steps_of(out):
    """What log.jsonl says, without what depends on the machine."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "memory_gb")} for line in lines]


# --------------------------------------------------------------------------------------------------- what is left


def test_a_run_leaves_a_control_a_grid_a_log_and_its_settings(base, tmp_path, capsys):
    assert run(base, tmp_path, "--steps", "2", "--sample-count", "2", "--validation", "2") == 0
    said = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("step 2: loss ") and ", control measure " in line and ", iou 0." in line for line in said
    )
    assert said[0].startswith("training on 8 pairs of fill50k, 2 for validation: a synthetic dataset")
    python, program, *command = shlex.split(said[-1])
    assert (python, program) == ("python", "infer.py")
    assert infer.main([*command, "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "made")]) == 0
    shutil.rmtree(tmp_path / "made")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith("cache/") and name != ".lock"}
    want = {"control.safetensors", "control-000002.safetensors", "control-best.safetensors", "state/000002.pt"}
    want |= {"samples/000002.png", "log.jsonl", "settings.json", "report.html", "example.png"}
    assert files == want
    control = control_of(tmp_path)
    assert len([key for key in control if key.startswith("control_model.zero_convs.")]) == 2 * 2
    assert all(control[key].abs().max() > 0 for key in control if ".zero_convs." in key)

    first, second = steps_of(tmp_path)
    assert [first["step"], second["step"]] == [1, 2]
    assert first.keys() == {"step", "loss", "lr", "gradient", "skipped", "bad"}
    assert second.keys() - first.keys() == {"validation_loss", "control_measure", "zero_convs", "iou", "grid"}
    assert len(second["zero_convs"]) == 3 and min(second["zero_convs"]) > 0 and 0 <= second["iou"] <= 1
    with Image.open(tmp_path / "samples" / "000002.png") as grid:
        assert grid.size == (4 * ONE_LEVEL.resolution, 2 * ONE_LEVEL.resolution)

    written = json.loads((tmp_path / "settings.json").read_text())
    assert written["settings"]["batch_size"] == 2 and written["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_recipe_trains_with_holes_and_ends_with_a_command_that_infer_takes(base, sd, tmp_path, monkeypatch, capsys):
    """Also pooled, as recipes for shuffling are; the hints of the batches come from the cache."""
    batches, inputs = [], train.loss_inputs
    monkeypatch.setattr(train, "loss_inputs", lambda *given: batches.append(given[1]) or inputs(*given))
    few = ["--recipe", "inpaint", "--global-average-pooling", "--steps", "1", "--sample-count", "1"]
    assert run(base, tmp_path, *few) == 0
    (hint,) = batches
    holes = (hint == -1).all(dim=1).float().mean(dim=(1, 2))
    assert hint.shape == (2, 3, 64, 64) and 0.05 < holes.min() < holes.max() < 0.8
    *_, command = capsys.readouterr().out.splitlines()
    words = [*shlex.split(command)[2:], "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "made")]
    assert "--mask" in words and infer.main(words) == 0
    assert ControlNet.load(tmp_path, sd).config.global_average_pooling


def test_a_lora_is_part_of_the_base_that_is_trained_on(base, tmp_path, capsys):
    lora = f"{write_small_lora(tmp_path / 'ink.safetensors', ONE_LEVEL)}:0.5"
    StableDiffusion.load(base, loras=[lora]).save(tmp_path / "merged.safetensors")
    few = ["--steps", "1", "--cache", str(tmp_path / "latents")]  # of one base
    assert run(base, tmp_path / "a", "--lora", lora, *few) == 0
    assert f" --base {base} --lora {lora} --control " in capsys.readouterr().out.splitlines()[-1]
    assert run(tmp_path / "merged.safetensors", tmp_path / "b", *few) == 0
    assert_equal(control_of(tmp_path / "a"), control_of(tmp_path / "b"))
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["settings"]["lora"] == [lora]
    capsys.readouterr()
    for words, said in [
        (["--resume", "--out", str(tmp_path / "a"), "--lora", f"{lora}5"], "was started with --lora"),
        ([*options(base, tmp_path / "c"), "--lora", "chalk", "--dry-run"], 'there is no LoRA "chalk"'),
    ]:
        assert train.main([*words, "--steps", "2", "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("option, status", [("--help", 0), ("--unheard-of", 2), ("--learning_rate", 2)])
def test_help_and_mistakes_answer_without_torch(tmp_path, option, status):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "train.py", option]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status and ("--resume" in done.stdout + done.stderr or "--lr here" in done.stderr)


def test_the_script_ends_with_the_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ended.value.code == 2 and "no run to resume" in capsys.readouterr().err


def test_only_the_newest_states_are_kept(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "3", "--save-every", "1", "--validation", "2", *cache) == 0
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["000002.pt", "000003.pt"]
    controls = {path.name.removeprefix("control").removesuffix(".safetensors") for path in tmp_path.glob("control*")}
    assert controls == {"", "-000002", "-000003", "-best"}
    assert (tmp_path / "control.safetensors").samefile(tmp_path / "control-000003.safetensors")
    losses = {line["step"]: line["validation_loss"] for line in steps_of(tmp_path) if "validation_loss" in line}
    assert losses.keys() == {1, 2, 3} and newest_state(tmp_path)["position"]["best"] == min(losses.values())


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "how",
    [
        ["--precision", "fp16", "--ema", "0.9", "--accumulate", "2", "--validation", "2"],
        ["--no-cache", "--save-every", "0.00001m"],
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(base, tmp_path, how):
    assert run(base, tmp_path / "whole", "--steps", "2", "--save-every", "1", "--images", "4", *how) == 0
    stopped_after(1, tmp_path / "whole", tmp_path / "parts")
    assert resume(tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def wait_for(process, out, step):
    while process.is_alive() and not ((out / "log.jsonl").exists() and len(logged(out)) >= step):
        time.sleep(0.005)


def kill_at(process, out, step):
    """Anywhere in a step, or in a save, after that many lines of the log."""
    wait_for(process, out, step)
    time.sleep(random.uniform(0, 0.03))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def logged(out):
    return (out / "log.jsonl").read_text().splitlines()


def killed_in_its_second_save(arguments):
    calls, original = [], torch.save

    def save(state, file):
        calls.append(state)
        if len(calls) == 2:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        original(state, file)

    torch.save = save
    train.main(arguments)


def newest_state(out):
    return torch.load(sorted((out / "state").glob("*.pt"))[-1], weights_only=True)


def test_a_run_that_was_killed_again_and_again_ends_as_if_it_was_not(base, tmp_path, cache, capsys):
    killed, how = tmp_path / "killed", ["--steps", "8", *cache]
    first = forked.start(train.main, [*options(base, killed), *how])
    wait_for(first, killed, step=1)
    os.kill(first.pid, signal.SIGSTOP)
    for other in (["--steps", "8"], ["--resume"]):  # the folder is taken while it lives
        assert train.main([*other, "--base", str(base), "--out", str(killed)]) == 2
        error = capsys.readouterr().err
        assert f'"{killed}" is being written by process {first.pid} on ' in error and error.strip().count("\n") == 0
    os.kill(first.pid, signal.SIGCONT)
    kill_at(first, killed, step=random.randint(1, 3))
    (killed / "state" / f".000002.pt.{first.pid}.tmp").mkdir(exist_ok=True)
    second = forked.start(killed_in_its_second_save, [*options(base, killed), "--resume", *how])
    second.join(timeout=300)
    assert second.exitcode == -signal.SIGKILL
    learned, saved = control_of(killed)["control_model.middle_block_out.0.weight"], newest_state(killed)["control"]
    assert list((killed / "state").glob(f".*.{second.pid}.tmp/*.pt")), "it was not killed while a state was written"
    assert not torch.equal(learned, saved["middle_zero_conv.weight"])  # which is written before
    assert resume(killed, *how) == 0
    assert not list(killed.rglob("*.tmp"))
    assert run(base, tmp_path / "whole", *how) == 0
    assert_same_run(tmp_path / "whole", killed)


def test_a_save_holds_the_step_at_which_it_began_though_the_training_goes_on(
    base, tmp_path, cache, copy_of_run, monkeypatch
):
    copy_of_run(tmp_path / "two", "--steps", "2")
    losses, later, original, write = [], threading.Event(), ControlLoss.forward, train.Training.write

    def loss(*given):
        losses.append(given)
        if len(losses) == 4:  # the third step is done, and the fourth has begun
            later.set()
        return original(*given)

    def late(training, state, best):
        assert later.wait(60)
        write(training, state, best)
        if state["step"] == 2:
            training.run.control.rename(tmp_path / "control.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(ControlLoss, "forward", loss)
        patch.setattr(train.Training, "write", late)
        assert run(base, tmp_path / "four", "--steps", "4", *cache) == 0
    states = [torch.load(tmp_path / name / "state" / "000002.pt", weights_only=True) for name in ("two", "four")]
    assert_equal(*states)
    assert_equal(control_of(tmp_path), control_of(tmp_path / "two"))


def test_a_save_that_fails_ends_the_run_at_once(base, tmp_path, cache, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "write", fail)
        assert run(base, tmp_path, "--steps", "500", *cache) == 2
    assert "No space left on device: make room, or give another folder as --out" in capsys.readouterr().err
    assert len(logged(tmp_path)) < 50


def test_a_signal_saves_the_step_and_stops(base, tmp_path, cache, copy_of_run, capsys, monkeypatch):
    """Ctrl-C in a terminal goes to the whole process group, in which the worker is not."""
    original = ControlLoss.forward

    def loss(*args):
        (worker,) = active_children()
        assert os.getpgid(worker.pid) != os.getpgrp()
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ControlLoss, "forward", loss)
        how = ["--steps", "2", "--save-every", "100", "--workers", "1", *cache]
        assert run(base, tmp_path / "parts", *how) == 128 + signal.SIGTERM
    assert "saved after step 1: go on with --resume --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "parts" / "state").iterdir()] == ["000001.pt"]
    assert (tmp_path / "parts" / "control.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is not None and resume(tmp_path / "parts") == 0
    copy_of_run(tmp_path / "whole", "--steps", "2")
    assert_equal(control_of(tmp_path / "whole"), control_of(tmp_path / "parts"))


def send(monkeypatch, number, call, module=ControlLoss, name="forward"):
    """The signal arrives in that call of a function."""
    calls, original = [], getattr(module, name)

    def function(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(module, name, function)


def test_a_signal_in_the_last_step_comes_too_late(base, tmp_path, cache, capsys, monkeypatch):
    send(monkeypatch, signal.SIGTERM, call=1)
    assert run(base, tmp_path, "--steps", "1", *cache) == 0
    said = capsys.readouterr()
    assert "--resume" not in said.err and said.out.splitlines()[-1].startswith("python infer.py")


def test_a_signal_may_ask_for_a_save_alone(base, tmp_path, cache, monkeypatch):
    send(monkeypatch, signal.SIGUSR1, call=1)
    assert run(base, tmp_path, "--steps", "2", "--save-every", "100", *cache) == 0
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == ["000001.pt", "000002.pt"]


def test_nohup_is_not_overruled():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals, signals.waiting():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_while_stderr_is_blocked(monkeypatch, number):
    def write(text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with monkeypatch.context() as patch, Signals() as signals, signals.waiting():
        patch.setattr(sys.stderr, "write", write)
        os.kill(os.getpid(), number)
        assert signals.received == number


def test_the_same_command_goes_on_with_the_latents(base, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(latent_cache, "SHARD", 4)
        send(patch, signal.SIGTERM, 2, latent_cache, "encode")
        assert run(base, tmp_path, "--steps", "1", "--batch-size", "4") == 128 + signal.SIGTERM
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error == "train.py: stopped at once: nothing is saved but cached latents, the same command starts again"
        assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
        calls, original = [], latent_cache.encode
        patch.setattr(latent_cache, "encode", lambda *given: calls.append(given) or original(*given))
        assert run(base, tmp_path, "--steps", "1", "--batch-size", "4") == 0 and len(calls) == 1


def test_latents_that_another_run_computes_are_waited_for(base, tmp_path, monkeypatch):
    context = get_context("fork")
    ready, waited_for, folder, said = context.Event(), context.Event(), tmp_path / "latents", []

    def compute():
        with locked(folder):
            ready.set()
            waited_for.wait(60)

    other = context.Process(target=compute)
    other.start()
    assert ready.wait(30)
    monkeypatch.setattr("controlnet.training.lock.note", lambda text: (said.append(text), waited_for.set()))
    assert run(base, tmp_path / "out", "--steps", "1", "--cache", str(folder)) == 0
    other.join()
    assert len(said) == 1 and f'"{folder}" is being written by process {other.pid} on' in said[0]


def test_a_second_ctrl_c_advises_what_works_then(tmp_path, copy_of_run, capsys, monkeypatch):
    copy_of_run(tmp_path, "--steps", "2")
    with monkeypatch.context() as patch:
        send(patch, signal.SIGINT, 1)
        send(patch, signal.SIGINT, 1)
        assert resume(tmp_path, "--steps", "3") == 130
    assert capsys.readouterr().err.strip().endswith(f"stopped at once: go on with --resume --out {tmp_path}")
    assert resume(tmp_path, "--steps", "3") == 0


def test_a_closed_pipe_does_not_end_a_run(base, tmp_path, cache, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as out, os.fdopen(os.dup(writer), "w") as err:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert run(base, tmp_path, "--steps", "2", *cache) == 0
    assert len(steps_of(tmp_path)) == 2


def test_a_killed_data_worker_is_one_sentence(base, tmp_path, cache, capsys, monkeypatch):
    original = ControlLoss.forward

    def loss(*given):
        for process in active_children():
            os.kill(process.pid, signal.SIGKILL)
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(ControlLoss, "forward", loss)
        assert run(base, tmp_path, "--steps", "500", "--workers", "1", *cache) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: a process that reads data has ended (") and "fewer --workers" in error


def test_a_run_can_be_resumed_at_another_rate(tmp_path, copy_of_run):
    copy_of_run(tmp_path, "--steps", "2")
    before = control_of(tmp_path)
    assert resume(tmp_path, "--steps", "3", "--lr", "1e-30") == 0
    after = control_of(tmp_path)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_finished_run_is_said_to_be_and_its_control_is_written_again_also_in_half(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path, "--steps", "2")
    before = control_of(tmp_path)
    (tmp_path / "control.safetensors").unlink()
    assert resume(tmp_path, "--save-dtype", "fp16") == 0
    assert "all 2 steps are done" in capsys.readouterr().out
    assert_equal(control_of(tmp_path), {key: tensor.half() for key, tensor in before.items()})


def test_damaged_settings_are_one_sentence(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path, "--steps", "2")
    whole = (tmp_path / "settings.json").read_text()
    capsys.readouterr()
    for damaged in (whole[:50], "[]", "{}", '{"settings": 1, "data": {}}', "[" * 99_999, "\udcff"):
        (tmp_path / "settings.json").write_text(damaged, errors="surrogateescape")
        assert resume(tmp_path, "--steps", "3") == 2
        error = capsys.readouterr().err
        assert "settings.json is damaged" in error and error.strip().count("\n") == 0


def test_a_run_is_not_resumed_as_another(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path, "--steps", "2")
    before = (tmp_path / "control.safetensors").read_bytes()
    assert resume(tmp_path, "--steps", "4", "--seed", "1") == 2
    assert "was started with --seed 0, not 1" in capsys.readouterr().err
    assert resume(tmp_path, "--steps", "4", "--precision", "bf16") == 2
    assert "--precision" in capsys.readouterr().err
    assert (tmp_path / "control.safetensors").read_bytes() == before


def test_a_base_without_autoencoder_is_trained_with_another_one(
    base, tmp_path, cache, copy_of_run, capsys, no_simulation
):
    tensors, vae = load_file(base), tmp_path / "vae.safetensors"
    own = {key: tensors.pop(key) for key in list(tensors) if key.startswith("first_stage_model.")}
    save_file(own, vae)
    save_file(tensors, tmp_path / "base.safetensors", {"config": json.dumps(ONE_LEVEL.to_dict())})
    arguments = ("--steps", "2", "--vae", str(vae), *cache)  # the latents are those of the base with its own
    assert run(tmp_path / "base.safetensors", tmp_path / "out", *arguments, "--dry-run") == 0
    assert run(tmp_path / "base.safetensors", tmp_path / "out", *arguments) == 0
    assert f"--vae {vae} --control" in capsys.readouterr().out
    copy_of_run(tmp_path / "whole", "--steps", "2")
    assert_equal(control_of(tmp_path / "out"), control_of(tmp_path / "whole"))
    capsys.readouterr()
    assert resume(tmp_path / "out", "--steps", "3", "--vae", str(base)) == 2
    assert f"was started with --vae {vae}, not" in capsys.readouterr().err


def test_zero_terminal_snr_is_a_setting_of_the_run(sd, tmp_path):
    plain = sd.with_parts()
    plain.config = replace(sd.config, schedule=ScheduleConfig("v"))
    plain.save(tmp_path / "base.safetensors")
    for given, expected in (([], False), (["--zero-snr"], True)):
        argv = ["--base", str(tmp_path / "base.safetensors"), "--out", str(tmp_path / "out"), *given]
        _, config = open_base_of(resolve(train_options.parse_args("", argv)))
        assert config.schedule.zero_terminal_snr == expected


# ---------------------------------------------------------------------------------------------------------- method


def test_half_precision_takes_the_path_of_cuda_and_keeps_the_copy_in_fp32(base, tmp_path):
    assert run(base, tmp_path, "--steps", "2", "--precision", "fp16", "--images", "2") == 0
    control = control_of(tmp_path)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in control.values())
    assert all(control[key].abs().max() > 0 for key in control if ".zero_convs." in key)
    assert newest_state(tmp_path)["optimisation"]["scaler"]


def test_the_copy_starts_from_the_bases_own_weights_not_from_rounded_ones(base, tmp_path):
    few = ["--images", "2", "--steps", "1", "--lr", "1e-30"]
    assert run(base, tmp_path, "--precision", "bf16", *few) == 0
    control, weights = control_of(tmp_path), load_file(base)
    copied = [key for key in control if key.replace("control_model.", "model.diffusion_model.") in weights]
    assert len(copied) > 50
    for key in copied:
        assert torch.equal(control[key], weights[key.replace("control_model.", "model.diffusion_model.")]), key
    assert not newest_state(tmp_path)["optimisation"]["scaler"]


def test_a_grid_that_overflows_is_left_out_and_the_run_goes_on(base, tmp_path, cache, capsys, monkeypatch):
    def fail(*_):
        raise FloatingPointError("vae.decoder gives values that are not finite")

    monkeypatch.setattr("controlnet.training.previews.Preview.save", fail)
    assert run(base, tmp_path, "--steps", "1", "--sample-count", "1", *cache) == 0
    assert "there is no grid of step 1: vae.decoder" in capsys.readouterr().err
    assert (tmp_path / "control.safetensors").exists()


def test_what_must_not_change_the_result_does_not(base, tmp_path, cache, copy_of_run):
    """Checkpointing, and the cutting of a step into accumulated batches."""
    how = ["--checkpointing", "--batch-size", "1", "--accumulate", "2"]
    copy_of_run(tmp_path / "plain", "--steps", "2")
    assert run(base, tmp_path / "other", "--steps", "2", *cache, *how) == 0
    plain, other = control_of(tmp_path / "plain"), control_of(tmp_path / "other")
    for key in plain:  # an untrained zero convolution takes a whole first step of Adam on the sign of rounding
        torch.testing.assert_close(plain[key], other[key], rtol=1e-3, atol=2e-5)
    for a, b in zip(steps_of(tmp_path / "plain"), steps_of(tmp_path / "other"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_latents_from_the_cache_are_those_of_each_step(base, tmp_path, copy_of_run):
    copy_of_run(tmp_path / "cached", "--steps", "2")
    assert run(base, tmp_path / "live", "--steps", "2", "--no-cache") == 0
    cached, live = steps_of(tmp_path / "cached"), steps_of(tmp_path / "live")
    assert [line["loss"] for line in cached] == pytest.approx([line["loss"] for line in live], rel=1e-4)


def test_an_unlocked_decoder_is_trained_and_saved_with_all_else_as_it_was(base, tmp_path):
    """Also where the locked parts are rounded to be computed with: the decoder is not."""
    few = ["--images", "2", "--precision", "bf16"]
    assert run(base, tmp_path, "--steps", "1", "--sd-unlocked", *few) == 0
    before, after = load_file(base), load_file(tmp_path / "base.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    start_of_decoder = ("model.diffusion_model.output_blocks.", "model.diffusion_model.out.")
    assert changed and all(key.startswith(start_of_decoder) for key in changed)
    assert not any(torch.equal(after[key], after[key].bfloat16().float()) for key in changed if after[key].ndim == 4)
    assert resume(tmp_path, "--steps", "2") == 0
    assert not torch.equal(load_file(tmp_path / "base.safetensors")[min(changed)], after[min(changed)])


def test_only_the_middle_is_controlled(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "1", "--only-mid-control", *cache) == 0
    control = control_of(tmp_path)
    assert all(not tensor.any() for key, tensor in control.items() if ".zero_convs." in key)
    assert all(control[key].any() for key in control if ".middle_block_out." in key)


@pytest.mark.parametrize("name", ["lite", "gaussian", "random", "frozen", "concat"])
def test_the_baselines_are_made_saved_and_loaded(tmp_path, name):
    sd, path = small_sd(SMALLEST), tmp_path / "control.safetensors"
    made = train.new_control(sd.unet, TrainSettings(architecture=name), RunFolder(tmp_path))
    made.save(path)
    values, control = load_file(path), ControlNet.load(path, sd.unet)
    assert control.config.architecture == (name if name in ("lite", "concat") else "full")
    assert any("transformer_blocks" in key for key in values) == (name != "lite")
    start = values.get("control_model.zero_convs.2.0.weight")
    if name == "concat":
        assert start is None
    else:
        assert start.std() > 0.1 if name == "gaussian" else not start.any()
    if name != "lite":  # which has no weights of the base
        names = [key for key, _ in sd.unet.encoder.named_parameters() if key.endswith("conv1.weight")]
        copied = [torch.equal(*(net.encoder.get_parameter(key) for net in (control, sd.unet))) for key in names]
        assert copied == [name != "random"] * len(names)
    trained = sum(parameter.requires_grad for parameter in made.parameters())
    own = 2 * len(control.hint_encoder.convs)  # weights and biases
    outputs = 2 * (len(control.zero_convs) + 1)
    assert trained == own if name == "concat" else trained == own + outputs if name == "frozen" else trained > 26
    x, t, context, hint = torch.ones(1, 4, 8, 8), torch.tensor([9]), sd.encode_text(["a"]), torch.ones(1, 3, 64, 64)
    assert [r.shape for r in control(x, t, context, hint)] == [
        r.shape for r in ControlNet.from_unet(sd.unet)(x, t, context, hint)
    ]


def test_a_baseline_is_trained(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "1", "--architecture", "frozen", *cache) == 0
    names = {key.split(".")[1] for key, tensor in control_of(tmp_path).items() if tensor.any()}
    assert {"zero_convs", "middle_block_out"} <= names
    hint_encoder_and_zero_convs = 2 * (8 + 3)  # weights and biases
    assert len(newest_state(tmp_path)["optimisation"]["optimizer"]["state"]) == hint_encoder_and_zero_convs
    assert resume(tmp_path, "--architecture", "full") == 2


def test_training_goes_on_from_a_control(base, sd, tmp_path, cache):
    small_control(sd).save(tmp_path / "before.safetensors")
    before = load_file(tmp_path / "before.safetensors")
    how = ["--lr", "1e-30", "--control", str(tmp_path / "before.safetensors")]
    assert run(base, tmp_path / "on", "--steps", "1", *how, *cache) == 0
    after = control_of(tmp_path / "on")
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-20)


def test_the_average_is_what_is_saved_and_validated(base, sd, tmp_path, cache, monkeypatch):
    seen, weighted = [], []

    def validated(self, loss):
        seen.append(zero_conv_norms(loss.control))
        weighted.append(loss.min_snr)
        return {}

    monkeypatch.setattr(ValidationLoss, "__call__", validated)
    assert run(base, tmp_path, "--steps", "2", "--ema", "0.5", "--min-snr", "5", "--validation", "1", *cache) == 0
    assert set(weighted) == {None}  # whatever the training's weights: losses are to be compared
    state, key = newest_state(tmp_path), "middle_zero_conv.weight"
    average = state["average"][f"module.{key}"]
    assert torch.equal(control_of(tmp_path)["control_model.middle_block_out.0.weight"], average)
    assert not torch.equal(state["control"][key], average)
    saved = ControlNet.load(tmp_path / "control.safetensors", sd)
    assert seen[-1] == steps_of(tmp_path)[-1]["zero_convs"] == pytest.approx(zero_conv_norms(saved))


# ------------------------------------------------------------------------------------------------- data of one's own


def own_pairs(folder, count=6, channels=3):
    """Pictures of 96x64 in the layout of fill50k."""
    (folder / "pictures").mkdir(parents=True)
    lines, rng = [], np.random.default_rng(0)
    for i in range(count):
        for kind in ("source", "target"):
            pixels = rng.integers(0, 256, (64, 96, channels if kind == "source" else 3), dtype=np.uint8).squeeze()
            Image.fromarray(pixels).save(folder / "pictures" / f"{kind}{i}.png")
        names = {kind: f"pictures/{kind}{i}.png" for kind in ("source", "target")}
        lines.append(json.dumps({**names, "prompt": f"number {i}"}))
    (folder / "prompt.json").write_text("\n".join(lines))
    return ["--data", str(folder), "--images", "100"]


@pytest.mark.parametrize("channels, how", [(1, []), (4, ["--no-cache", "--flip", "--random-crop"])])
def test_a_folder_of_pairs_is_trained_on(base, tmp_path, channels, how):
    data = own_pairs(tmp_path / "pairs", channels=channels)
    chosen = [*data, "--size", "128x64", "--hint-channels", str(channels), "--sample-count", "1", *how]
    assert run(base, tmp_path / "out", "--steps", "1", *chosen) == 0
    assert control_of(tmp_path / "out")["control_model.input_hint_block.0.weight"].shape[1] == channels
    with Image.open(tmp_path / "out" / "samples" / "000001.png") as grid:
        assert grid.size == (4 * 128, 64)


def test_a_stream_of_tar_shards_goes_on_exactly(base, tmp_path, capsys):
    own_pairs(tmp_path / "pairs", count=5)
    (tmp_path / "shards").mkdir()
    for i in range(5):  # the first three in 0.tar
        with tarfile.open(tmp_path / "shards" / f"{i // 3}.tar", "a") as archive:
            for kind, end in (("source", "hint.png"), ("target", "png")):
                archive.add(tmp_path / "pairs" / "pictures" / f"{kind}{i}.png", f"{i}.{end}")
    how = ["--data", str(tmp_path / "shards"), "--prompt", "", "--validation", "1", "--batch-size", "3"]
    assert run(base, tmp_path / "whole", "--steps", "2", "--save-every", "1", *how, "--no-cache") == 0
    assert "is read as tar shards: 2, the first with 2 pairs" in capsys.readouterr().out
    stopped_after(1, tmp_path / "whole", tmp_path / "parts")
    assert resume(tmp_path / "parts") == 0  # into the second epoch
    assert_equal(newest_state(tmp_path / "whole"), newest_state(tmp_path / "parts"))
    assert run(base, tmp_path / "cached", "--steps", "1", *how) == 0
    assert len(list((tmp_path / "cached" / "cache" / "hints").iterdir())) == 4


def test_captions_are_not_needed_where_none_is_used(base, tmp_path, capsys):
    data = own_pairs(tmp_path / "pairs")
    table = tmp_path / "pairs" / "prompt.json"
    table.write_text(re.sub('"number [0-4]"', '""', table.read_text()))
    dropped = ["--steps", "1", *data, "--cache", str(tmp_path / "latents")]
    assert run(base, tmp_path / "out", *dropped) == 2
    error = capsys.readouterr().err
    assert "prompt.json:1 has no caption" in error and "--prompt-dropout 1" in error
    assert run(base, tmp_path / "out", *dropped, "--prompt-dropout", "1") == 0
    assert "6 pairs, 5 of them without a caption" in capsys.readouterr().out


def test_buckets_train_each_shape_uncropped_and_resume_exactly(base, tmp_path, capsys):
    """Three shapes, one of a single picture, and hints that are the pictures."""
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for i, size in enumerate([(64, 64)] * 3 + [(128, 32)] * 3 + [(32, 128)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(pairs / f"{i}.png")
    lines = [{"target": f"{i}.png", "source": f"{i}.png", "prompt": f"number {i}"} for i in range(7)]
    (pairs / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    data = ["--data", str(pairs), "--buckets", "--images", "100"]
    assert run(base, tmp_path / "whole", *data, "--steps", "3") == 0
    assert "images of 3 sizes (width x height): 64x64 for 3, 32x128 for 3, 128x32 for 1" in capsys.readouterr().out
    stopped_after(2, tmp_path / "whole", tmp_path / "parts")
    assert resume(tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert resume(tmp_path / "parts", "--steps", "6", "--batch-size", "3") == 2
    assert (
        "with --buckets each batch has one size, and the run was started with --batch-size 2" in capsys.readouterr().err
    )
    assert run(base, tmp_path / "live", *data, "--steps", "2", "--no-cache") == 0
    for live, cached in zip(steps_of(tmp_path / "live"), steps_of(tmp_path / "whole"), strict=False):
        assert live["loss"] == pytest.approx(cached["loss"], rel=1e-4)


def test_a_grid_of_pictures_that_are_trained_on_leaves_bad_ones_out(base, tmp_path):
    data = own_pairs(tmp_path / "pairs", count=3)
    (tmp_path / "pairs" / "pictures" / "target0.png").write_bytes(b"no picture")
    few = ["--sample-count", "3", "--bad-share", "0.5"]
    assert run(base, tmp_path / "out", "--steps", "1", *data, *few) == 0
    with Image.open(tmp_path / "out" / "samples" / "000001.png") as grid:
        assert grid.size == (4 * 64, 2 * 64)


def test_bad_samples_are_skipped_and_counted_up_to_a_share(base, tmp_path, capsys):
    data = [*own_pairs(tmp_path / "pairs", count=8), "--validation", "2"]
    entries = (tmp_path / "pairs" / "prompt.json").read_text()
    (tmp_path / "pairs" / "prompt.json").write_text(entries + "\n{broken\n")
    trained_on, _ = split(recognise(tmp_path / "pairs", Wanted()).entries, validation=2)
    trained_on[1].image.write_bytes(b"no picture")
    assert run(base, tmp_path / "few", "--steps", "1", *data, "--bad-share", "0.3") == 0
    assert steps_of(tmp_path / "few")[-1]["bad"] == 2
    capsys.readouterr()
    for how in ([], ["--no-cache"]):
        assert run(base, tmp_path / "many", "--steps", "3", *data, "--bad-share", "0.15", *how) == 2
        error = capsys.readouterr().err
        assert "2 of 7 samples are bad" in error and "tools.check_data" in error
        assert not (tmp_path / "many" / "control.safetensors").exists()


# ----------------------------------------------------------------------------------- what a run finds when it goes on


def nothing_is_computed(patch):
    def encode(*_):
        raise AssertionError("latents are computed")

    patch.setattr(latent_cache, "encode", encode)


@pytest.fixture(scope="module")
def own_run(base, sd, tmp_path_factory):
    """A folder with pairs, a base, and what a step on these has left, begun with a control that is gone by now."""
    folder = tmp_path_factory.mktemp("own")
    data = own_pairs(folder / "a" / "pairs")
    mine, control = folder / "a" / "base.safetensors", folder / "a" / "control.safetensors"
    mine.write_bytes(base.read_bytes())
    small_control(sd).save(control)
    assert run(mine, folder / "out", "--steps", "1", "--save-every", "1", *data, "--control", str(control)) == 0
    control.unlink()
    return folder


def test_a_run_goes_on_wherever_its_data_base_and_control_lie_by_now(own_run, tmp_path, monkeypatch):
    """In another folder, since another time, reached by a link and a relative path."""
    shutil.copytree(own_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "a").rename(tmp_path / "b")
    for path in (tmp_path / "b").rglob("*"):
        os.utime(path, (1, 1))
    (tmp_path / "c").symlink_to(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    nothing_is_computed(monkeypatch)
    new = ["--data", str(Path("c") / "pairs"), "--base", str(Path("c") / "base.safetensors")]
    assert resume(tmp_path / "out", "--steps", "2", *new) == 0
    assert [line["step"] for line in steps_of(tmp_path / "out")] == [1, 2]


def edit_image(folder, base):
    """Of the same size, as bitmaps are."""
    for image in (folder / "pictures").glob("target*"):
        image.write_bytes(image.read_bytes()[:-30] + bytes(30))


def remove_pair(folder, base):
    path = folder / "prompt.json"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))


def change_unet(folder, base):
    sd = StableDiffusion.load(base)
    next(sd.unet.decoder.parameters()).data *= 2
    sd.save(base)


CHANGES = {
    "images": edit_image,
    "samples: 5 where 6 was": remove_pair,
    "UNet": change_unet,
}


@pytest.mark.parametrize("what", [["images", "UNet"], ["samples: 5 where 6 was"]])
def test_a_run_does_not_go_on_with_other_data_or_another_base(own_run, tmp_path, capsys, monkeypatch, what):
    """Which is found before anything is computed or written."""
    shutil.copytree(own_run, tmp_path, dirs_exist_ok=True)
    out, pairs, mine = tmp_path / "out", tmp_path / "a" / "pairs", tmp_path / "a" / "base.safetensors"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    for changed in what:
        CHANGES[changed](pairs, mine)
    capsys.readouterr()
    nothing_is_computed(monkeypatch)
    assert resume(out, "--steps", "2", "--data", str(pairs), "--base", str(mine)) == 2
    error = capsys.readouterr().err
    assert "other data or another base (" in error
    assert all(changed in error.split("(")[1].split(")")[0] for changed in what)
    assert f"--control {out / 'control.safetensors'}" in error and f"--cache {out / 'cache'}" in error
    assert error.strip().count("\n") == 0
    assert before == {path: path.read_bytes() for path in before}


def test_a_damaged_state_is_left_for_the_one_before(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path, "--steps", "3")
    whole = control_of(tmp_path)
    newest = tmp_path / "state" / "000003.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    newest.write_bytes(damaged)
    capsys.readouterr()
    assert resume(tmp_path) == 0
    error = capsys.readouterr().err.splitlines()[0]
    assert error == f'"{newest}" is damaged, its name ends in .damaged now: going on from step 2'
    assert_equal(control_of(tmp_path), whole)
    assert newest.with_suffix(".damaged").read_bytes() == damaged
    assert [line["step"] for line in steps_of(tmp_path)] == [1, 2, 3]


def test_a_run_without_a_whole_state_is_not_begun_again(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path, "--steps", "3")
    before = (tmp_path / "control.safetensors").read_bytes()
    for path in (tmp_path / "state").iterdir():
        path.write_bytes(path.read_bytes()[:-1000])
    for _ in range(2):
        capsys.readouterr()
        assert resume(tmp_path, "--steps", "6") == 2
        error = capsys.readouterr().err
        assert "no state in" in error and "000003.pt" in error and error.strip().count("\n") == 0
    assert (tmp_path / "control.safetensors").read_bytes() == before


def test_files_of_the_users_own_are_in_nobodys_way(tmp_path, copy_of_run):
    copy_of_run(tmp_path, "--steps", "2")
    names = ["000002 (best).pt", "best.pt", "000002.pt.bak", "2.5.pt", "._000002.pt", ".DS_Store", "\u00b2.pt"]
    for name in names:
        (tmp_path / "state" / name).write_bytes(b"mine")
    log = tmp_path / "log.jsonl"
    log.write_bytes(
        log.read_bytes() + b'null\n\xff\xfe\n[1]\n{"step": "2"}\n{"step": null}\n3\n' + b"[" * 99_999 + b'\n{"st'
    )
    assert resume(tmp_path, "--steps", "4", "--save-every", "1") == 0
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == sorted([*names, "000003.pt", "000004.pt"])
    assert all((tmp_path / "state" / name).read_bytes() == b"mine" for name in names)
    assert [line["step"] for line in steps_of(tmp_path)] == [1, 2, 3, 4]


EDITS = [
    ("batch_size", -3),
    ("batch_size", "many"),
    ("batch_size", 2.5),
    ("batch_size", [1, 2]),
    ("batch_size", {}),
    ("base", 3),
    ("optimizer", "sgd"),
    ("optimizer", 1),
    ("lr", float("nan")),
    ("lr", 0),
    ("sd_unlocked", 1),
    ("prompt_dropout", 7),
    ("size", "x"),
    ("seed", None),
    ("validate", [["hint.png"]]),
    ("log", ["paper"]),
]


def test_edited_settings_are_one_sentence(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path, "--steps", "2")
    path = tmp_path / "settings.json"
    written = json.loads(path.read_text())
    for name, value in EDITS:
        path.write_text(json.dumps({**written, "settings": {**written["settings"], name: value}}))
        capsys.readouterr()
        assert resume(tmp_path) == 2, (name, value)
        error = capsys.readouterr().err.strip()
        assert (name in error or str(value) in error) and error.count("\n") == 0


# ---------------------------------------------------------------------------------------------------------- errors


def test_another_run_is_not_overwritten(base, tmp_path, copy_of_run, cache, capsys):
    copy_of_run(tmp_path, "--steps", "2")
    before = (tmp_path / "control.safetensors").read_bytes()
    assert run(base, tmp_path, "--steps", "2", *cache) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert (tmp_path / "control.safetensors").read_bytes() == before


BAD_CALLS = [
    (["--resume"], "no run to resume"),
    (["--base", "none.safetensors"], "none.safetensors"),
    (["--data", "nowhere"], 'no folder "nowhere"'),
    (["--size", "100"], "multiples of"),
    (["--ema", "0.9", "--sd-unlocked"], "leave out one"),
    (["--device", "cuda:77"], "cuda:77"),
    (["--out", "/dev/null/run"], "another place"),
    (["--control", "x.safetensors", "--architecture", "lite"], "leave out --architecture"),
    (["--only-mid-control", "--architecture", "concat"], "leave out --only-mid-control"),
    (["--cache", "/proc"], "empty or new folder as --cache"),
    (["--optimizer", "adamw8bit"], "pip install bitsandbytes"),
    (["--log", "tensorboard"], "pip install tensorboard"),
    (["--log", "wandb"], "pip install wandb"),
    (["--steps", "2", "--epochs", "3"], "leave out one"),
    (["--seed", str(2**64)], "less than 2^64"),
    (["--validate", "nowhere.png", "a cat"], "nowhere.png"),
]


@pytest.mark.parametrize("arguments, words", BAD_CALLS)
def test_a_bad_call_is_one_sentence(base, tmp_path, capsys, arguments, words):
    if words.startswith("pip install") and find_spec(words.split()[-1]):
        pytest.skip(f"{words.split()[-1]} is installed here")
    assert run(base, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out" / "control.safetensors").exists()


@pytest.mark.parametrize(
    "option, value",
    [
        ("--steps", "x"),
        ("--seed", "-1"),
        ("--lr", "0"),
        ("--clip", "nan"),
        ("--prompt-dropout", "2"),
        ("--size", "64x"),
    ],
)
def test_a_number_that_means_nothing_is_refused(capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        train.main([option, value])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f'argument {option}: it is "{value}", expected' in error


def test_data_without_a_name_are_not_the_current_folder(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", ""])
    assert stopped.value.code == 2 and "argument --data: it is empty" in capsys.readouterr().err


@pytest.fixture
def no_simulation(monkeypatch):
    """What a step holds is found out in test_memory.py. Here it is 0.1 GB an image, with checkpointing half of it."""

    def held(run, size, batch_size, gradients_last):
        return [10**8 * batch_size // (1 + run.settings.checkpointing)]

    monkeypatch.setattr(simulation.FakeRun, "step", held)
    for name in ("encoding", "decoding"):
        monkeypatch.setattr(simulation.FakeRun, name, lambda *_: [0])
    monkeypatch.setattr(simulation, "make_fake", lambda module: None)  # they are on the meta device


def test_a_dry_run_counts_missing_files_and_names_the_first(base, tmp_path, capsys, no_simulation):
    data, pictures = own_pairs(tmp_path / "pairs", count=8), tmp_path / "pairs" / "pictures"
    plan = ["--steps", "1", "--dry-run", *data, "--bad-share", "0.4", "--validation", "2"]
    trained_on, _ = split(recognise(tmp_path / "pairs", Wanted()).entries, validation=2)
    trained_on[0].image.unlink()
    trained_on[3].hint.unlink()
    assert run(base, tmp_path / "out", *plan) == 0
    out = capsys.readouterr().out
    assert "4 pairs of 64x64 pixels" in out
    assert f'2 pairs cannot be used: "{trained_on[0].image}" does not exist, "{trained_on[3].hint}" does' in out
    for path in pictures.iterdir():
        path.unlink()
    assert run(base, tmp_path / "out", *plan) == 2
    error = capsys.readouterr().err
    assert f'6 of 6 samples are bad (for example "{trained_on[0].image}" does not exist)' in error
    assert not (tmp_path / "out").exists()


def test_a_dry_run_opens_the_base_and_the_control(base, sd, tmp_path, capsys):
    """And simulates a step in earnest."""
    control, out = tmp_path / "control.safetensors", tmp_path / "out"
    small_control(sd).save(control)
    assert run(base, out, "--steps", "1", "--dry-run", "--control", str(control)) == 0
    assert re.search(r"activations +0\.0[1-9] GB", capsys.readouterr().out)
    without_vae = {key: value for key, value in load_file(base).items() if not key.startswith("first_stage_model.")}
    with safe_open(base, "pt") as file:
        save_file(without_vae, tmp_path / "base.safetensors", file.metadata())
    tensors = load_file(control)
    save_file({key: tensors[key] for key in list(tensors)[1:]}, tmp_path / "cut.safetensors")
    bad = [
        (["--control", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--control", str(base)], "holds no ControlNet"),
        (["--control", str(tmp_path / "cut.safetensors")], "1 key missing"),
        (["--control", str(control), "--hint-channels", "1", "--data", "nowhere"], "say --hint-channels 3"),
        (["--base", str(tmp_path / "base.safetensors")], "no autoencoder"),
    ]
    for arguments, words in bad:
        capsys.readouterr()
        assert run(base, out, "--steps", "1", "--dry-run", *arguments) == 2, words
        error = capsys.readouterr().err
        assert words in error and error.strip().count("\n") == 0
    assert not out.exists()


def test_a_dry_run_says_what_would_be_trained_and_leaves_nothing(tmp_path, capsys, monkeypatch, no_simulation):
    """Without the base's weights, with an endless world's default of pictures, and by two processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = ["--steps", "10", "--batch-size", "32", "--accumulate", "5", "--out", str(tmp_path / "out"), "--dry-run"]
    assert train.main(["--base", "tiny", *plan]) == 0
    out = capsys.readouterr().out
    assert (
        "2000 pairs of 128x128 pixels, 3200 samples seen (1.6 epochs)" in out and "10 optimizer steps of 5 x 32" in out
    )
    assert "activations" in out and "at most, all together" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [["--detect", "canny", "--ema", "0.9", "--keep", "3"], ["--sd-unlocked"]])
def test_a_dry_run_knows_what_the_run_will_write(base, tmp_path, capsys, no_simulation, how):
    """And that it fits, to a fifth: files have headers, and the optimizer's state has steps."""
    data, out = [*own_pairs(tmp_path / "pairs", count=20), *how, "--save-every", "1"], tmp_path / "out"
    assert run(base, out, "--steps", "1", *data, "--dry-run") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    said = {what: float(size) for size, what in re.findall(r"([\d.e+-]+) MB for ([^,;]+)", line)}
    keep = 3 if "--keep" in how else 2
    assert run(base, out, "--steps", "1", *data) == 0
    written = {
        "latents": sum(file.stat().st_size for file in (out / "cache").rglob("*.*")),
        f"{keep + 1} states": (keep + 1) * max(file.stat().st_size for file in (out / "state").iterdir()),
        f"{keep + 2} ControlNets": (keep + 2) * (out / "control.safetensors").stat().st_size,
        **{file.name: file.stat().st_size for file in out.glob("base.safetensors")},
    }
    assert said.keys() == written.keys()
    assert {what: size * 1e6 for what, size in said.items()} == pytest.approx(written, rel=0.2)


@pytest.mark.parametrize("what", ["too full", "another run", "no cache", "no image"])
def test_a_dry_run_refuses_what_would_fail_later(base, tmp_path, capsys, monkeypatch, copy_of_run, no_simulation, what):
    data, how = own_pairs(tmp_path / "pairs", count=20), ["--dry-run", "--steps", "1"]
    words = {
        "too full": "give another folder as --out",
        "another run": "holds a run",
        "no cache": "something other than cached latents",
    }
    if what == "too full":
        monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    elif what == "another run":
        copy_of_run(tmp_path / "out", "--steps", "2")
    elif what == "no cache":
        how += ["--cache", str(tmp_path / "pairs")]
    else:
        (tmp_path / "pairs" / "pictures" / "source3.png").write_bytes(b"GIF")
    capsys.readouterr()
    assert run(base, tmp_path / "out", *data, *how) == 2
    error = capsys.readouterr().err
    assert words.get(what, "source3.png") in error and error.strip().count("\n") == 0


def test_a_dry_run_names_the_batch_size_that_fits(base, tmp_path, capsys, no_simulation):
    plan = ["--steps", "1", "--dry-run", "--sd-unlocked"]
    assert run(base, tmp_path / "out", *plan, "--fit", "1") == 0
    *_, together, plain, checkpointed, _ = capsys.readouterr().out.splitlines()
    assert "at most, all together" in together
    assert plain.startswith("1 GB hold --batch-size 4 (") and checkpointed.startswith("1 GB hold --batch-size 8 --chec")
    assert run(base, tmp_path / "out", *plan, "--fit", "0.1", "--checkpointing") == 0
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.startswith("0.1 GB do not hold --batch-size 1 --checkpointing, which needs 0.")
    assert line.endswith(
        ": leave out --sd-unlocked, add --precision fp16, add --optimizer adamw8bit, or give a smaller --size"
    )
    assert run(base, tmp_path / "out", "--fit", "8") == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_no_memory_is_one_sentence(base, tmp_path, cache, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(ControlLoss, "forward", fail)
    assert run(base, tmp_path, *cache) == 2
    assert "out of memory: add --checkpointing or --precision fp16, or take a smaller" in capsys.readouterr().err


@contextmanager
def no_file_above(size):
    """The system's way to test a full disk without a disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_sentence_and_what_was_saved_is_whole(tmp_path, copy_of_run, capsys):
    copy_of_run(tmp_path, "--steps", "2")
    control, state = tmp_path / "control.safetensors", tmp_path / "state" / "000002.pt"
    before, whole = control_of(tmp_path), state.read_bytes()
    size = control.stat().st_size
    assert size < len(whole) // 2
    for room, written in ((size // 2, "control-000003.safetensors"), (len(whole) // 2, "state/000003.pt")):
        capsys.readouterr()
        with no_file_above(room):
            assert resume(tmp_path, "--steps", "3") == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
        assert len(error) == 1 and "what was saved is intact" in error[0] and str(tmp_path / written) in error[0]
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["000002.pt"] and state.read_bytes() == whole
        assert "state" in written or assert_equal(control_of(tmp_path), before) is None
        assert not list(tmp_path.rglob("*.tmp"))
    assert resume(tmp_path, "--steps", "3") == 0


def test_a_disk_that_is_full_of_latents_is_one_sentence(base, tmp_path, capsys):
    with no_file_above(20_000):
        assert run(base, tmp_path, "--steps", "1") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(error) == 1 and f"{tmp_path}/cache/" in error[0] and "--cache" in error[0]
    assert run(base, tmp_path, "--steps", "1") == 0


@pytest.mark.parametrize("taken", ["", "state", "log.jsonl", ".lock", "settings.json"])
def test_an_unusable_out_is_found_before_latents_are_computed(base, tmp_path, capsys, monkeypatch, taken):
    out = tmp_path / "out"
    if taken in ("", "state"):
        out.mkdir() if taken else None
        (out / taken).write_text("a file")
    else:
        (out / taken).mkdir(parents=True)
    nothing_is_computed(monkeypatch)
    assert run(base, out, "--steps", "1") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(error) == 1 and str(out / taken) in error[0] and "give another place" in error[0]
