"""Two processes of batch b learn what one of 2 b learns: train.py under torchrun, with gloo on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import small_sd

import train

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    small_sd().save(tmp_path / "base.safetensors")
    few = [
        "--images",
        "16",
        "--validation",
        "2",
        "--sample-count",
        "0",
        "--lr",
        "1e-3",
        "--warmup",
        "1",
        "--steps",
        "2",
    ]
    options = ["--base", str(tmp_path / "base.safetensors"), "--device", "cpu", "--accumulate", "2", *few]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    two = [*torchrun, "train.py", *options, "--batch-size", "2", "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(two, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the ControlNet is") == 1  # one writer, one talker
    one = [*options, "--batch-size", "4", "--out", str(tmp_path / "one"), "--cache", str(tmp_path / "two" / "cache")]
    assert train.main(one) == 0

    alone, together = (load_file(tmp_path / name / "control.safetensors") for name in ("one", "two"))
    for key in alone:
        difference = (alone[key] - together[key]).norm() / alone[key].norm().clamp(min=1e-3)
        assert difference < 1e-3, key
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 2
    for a, b in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["gradient"] == pytest.approx(
            b["gradient"], rel=1e-4
        )
