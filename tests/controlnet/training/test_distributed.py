"""Several processes of batch b learn what one of a larger batch does: train.py under torchrun, with gloo on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from forked import train_in
from safetensors.torch import load_file
from small import SMALLEST, small_sd

import train
from controlnet.training import distributed
from controlnet.training.distributed import launch, started_again

ROOT = Path(__file__).parents[3]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FEW = [
    "--images",
    "16",
    "--validation",
    "1",
    "--sample-count",
    "0",
    "--validate-every",
    "100",
    "--save-every",
    "1",
    "--accumulate",
    "2",
]
HOW = [*FEW, "--steps", "3", "--lr", "1e-3", "--warmup", "1", "--optimizer", "adamw", "--lr-schedule", "constant"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the base, and the run of one process as `one`."""
    folder = tmp_path_factory.mktemp("distributed")
    small_sd(SMALLEST).save(folder / "base.safetensors")
    assert train.main([*options(folder, batch=4), "--out", str(folder / "one")]) == 0
    return folder


def options(folder, batch):
    return ["--base", str(folder / "base.safetensors"), "--device", "cpu", "--batch-size", str(batch), *HOW]


def start(*command, cwd=ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, **pipes)


def finished(process) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-5000:]
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_close(one, other):
    """The same to rounding."""
    a, b = (load_file(run / "control.safetensors") for run in (one, other))
    for key in a:
        assert (a[key] - b[key]).norm() / a[key].norm().clamp(min=1e-3) < 1e-3, key
    assert [line["step"] for line in log_of(one)] == [line["step"] for line in log_of(other)]
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient"] == pytest.approx(b["gradient"], rel=1e-4)


def test_two_machines_that_share_the_moments_are_one_process_with_four_times_the_batch(folder):
    """Two processes each, with the variables that torchrun sets; the disk is the same."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "4"}
    how, processes = [*options(folder, batch=1), "--out", "four", "--shard"], []
    for rank in range(4):
        variables = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        processes.append(forked.start(train_in, folder, f"said {rank}", variables, how))
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * 4
    said = [(folder / f"said {rank}").read_text() for rank in range(4)]
    assert "the ControlNet is" in said[0] and not any(said[1:])  # one writer, one talker
    assert_close(folder / "one", folder / "four")
    assert not [path for path in (folder / "four" / "cache").iterdir() if path.name[0] == "." and path.name != ".lock"]
    # Any number of processes goes on from what they saved, with or without --shard: here one, from the step before.
    (folder / "four" / "state" / "000003.pt").unlink()
    assert train.main(["--resume", "--out", str(folder / "four"), "--device", "cpu", "--batch-size", "4"]) == 0
    assert_close(folder / "one", folder / "four")


# Each process has a folder of its own for its disk, and the second kills itself in its third step, once.
OWN_DISKS = """
import os, signal, sys
os.makedirs(f"disk{os.environ['RANK']}", exist_ok=True)
os.chdir(f"disk{os.environ['RANK']}")
import train
calls, original = [], train.ControlLoss.forward
def forward(*given):
    calls.append(given)
    if len(calls) == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given)
train.ControlLoss.forward = forward
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and os.environ["RANK"] == "0":
    print("again after", sorted(os.listdir("run/state"))[-1])
sys.exit(train.main(sys.argv[1:]))
"""


def test_processes_with_disks_of_their_own_are_started_again_and_go_on(folder):
    (folder / "own_disks.py").write_text(OWN_DISKS)
    again = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    how = [*options(folder, batch=2), "--out", "run"]
    said = finished(start(*TORCHRUN, *again, "own_disks.py", *how, cwd=folder))
    assert "again after 00000" in said
    main, other = folder / "disk0" / "run", folder / "disk1" / "run"
    assert sorted(path.name for path in other.iterdir()) == ["cache"]  # the run's folder is the main one's alone
    assert_close(folder / "one", main)
    places = [list((run / "cache").glob("*.safetensors")) for run in (folder / "one", main, other)]
    files = [load_file(file) for (file,) in places]
    for name, tensor in files[0].items():  # made with another number of threads
        assert torch.equal(files[1][name], files[2][name])
        torch.testing.assert_close(tensor, files[1][name], rtol=1e-3, atol=1e-3)


def test_only_the_same_call_of_torchrun_goes_on_by_itself(folder, monkeypatch, capsys):
    """Another run in the folder is refused when processes are started again, too."""
    assert launch() is None and not started_again()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert started_again() and launch().endswith(f", by process {os.getppid()} on {distributed.platform.node()}")
    assert train.main([*options(folder, batch=4), "--out", str(folder / "one")]) == 2
    assert "holds a run already: go on with --resume" in capsys.readouterr().err


def test_moments_of_another_optimizer_are_not_shared(folder, capsys):
    assert train.main([*options(folder, batch=1), "--out", str(folder / "new"), "--optimizer", "muon", "--shard"]) == 2
    assert "--shard is for adamw, and the optimizer is muon: say --optimizer adamw" in capsys.readouterr().err
