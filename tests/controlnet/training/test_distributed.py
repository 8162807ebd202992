"""Several processes of batch b learn what one of a larger batch does: train.py under torchrun, with gloo on the CPU."""

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
import torch
from forked import train_in
from safetensors.torch import load_file
from small import SMALLEST, small_sd
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from controlnet.objective import ControlLoss
from controlnet.training import distributed
from controlnet.training.distributed import launch, started_again

FEW = "--images 16 --validation 1 --sample-count 0 --validate-every 100 --save-every 1 --accumulate 2"
HOW = f"{FEW} --steps 3 --lr 1e-3 --warmup 1 --optimizer adamw --lr-schedule constant".split()

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


def train_on_its_own_disk(folder, arguments):
    """In a folder of each process's own. The second kills itself in its third step, once."""
    rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    disk, calls, original = folder / f"disk{rank}", [], ControlLoss.forward
    disk.mkdir(exist_ok=True)

    def forward(*given):
        calls.append(given)
        if len(calls) == 5 and (rank, restarts) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    ControlLoss.forward = forward
    if (rank, restarts) == ("0", "1"):
        (folder / "again after").write_text(max(path.name for path in (disk / "run" / "state").iterdir()))
    train_in(disk, folder / f"said {rank}", {}, arguments)


def test_processes_with_disks_of_their_own_are_started_again_and_go_on(folder):
    """By what torchrun calls, so that its processes are forked; in a thread, where it leaves the signals alone."""
    where = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="own disks")
    config = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=1, start_method="forkserver", **where)
    how = [*options(folder, batch=2), "--out", "run"]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(elastic_launch(config, train_on_its_own_disk), folder, how).result(timeout=300)
    assert (folder / "again after").read_text().startswith("00000")
    main, other = folder / "disk0" / "run", folder / "disk1" / "run"
    assert sorted(path.name for path in other.iterdir()) == ["cache"]  # the run's folder is the main one's alone
    assert_close(folder / "one", main)
    places = [list((run / "cache").glob("*.safetensors")) for run in (folder / "one", main, other)]
    files = [load_file(file) for (file,) in places]
    for name, tensor in files[0].items():  # perhaps with another number of threads
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
