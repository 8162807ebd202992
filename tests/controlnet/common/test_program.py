"""What the programs share: threads that sleep, options as fields, settings read back from files."""

import argparse
import importlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from controlnet.common.program import path_argument, run

ROOT = Path(__file__).parents[3]
POLICY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def policy_after(code, **environment):
    """What OpenMP finds in the environment once PyTorch is imported by a program."""
    others = {name: value for name, value in os.environ.items() if name not in POLICY}
    report = f"print('torch' in sys.modules, [os.environ.get(name) for name in {POLICY}])"
    code = f"import atexit, os, sys; atexit.register(lambda: {report}); {code}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={**others, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


HELP = "import infer; infer.main(['--help'])"


@pytest.mark.parametrize("code", [HELP, "import tools"])
def test_threads_sleep_before_pytorch_is_there(code):
    assert policy_after(code) == "False ['PASSIVE', '3000', None]"


def test_an_empty_path_is_not_the_current_folder():
    assert path_argument("out dir") == Path("out dir")
    with pytest.raises(argparse.ArgumentTypeError, match="it is empty, expected a path"):
        path_argument(" ")


def test_train_sets_the_policy_before_it_imports_pytorch():
    lines = (ROOT / "train.py").read_text().splitlines()
    assert lines.index("    share_cores()") < lines.index("import torch")


def test_ctrl_c_before_a_program_runs_shows_no_traceback():
    code = "import tools; raise {}"
    stopped, broken = (
        subprocess.run([sys.executable, "-c", code.format(error)], cwd=ROOT, capture_output=True, text=True)
        for error in ("KeyboardInterrupt", "ValueError")
    )
    assert stopped.returncode != 0 and stopped.stderr == "" and "Traceback" in broken.stderr


@pytest.mark.parametrize(
    "name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "1")]
)
def test_what_the_user_has_set_stays(name, value):
    want = [value if n == name else None for n in POLICY]
    assert policy_after(HELP, **{name: value}) == f"False {want}"


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_what_cuda_says_when_memory_is_out(message, capsys):
    def work():
        raise RuntimeError(message)

    assert run("infer.py", work, memory_advice="take less") == 2
    assert capsys.readouterr().err == "infer.py: out of memory: take less\n"


@pytest.mark.parametrize("package", ["torch", "torchvision", "numpy", "PIL", "einops", "safetensors", "tqdm"])
def test_a_package_that_is_not_installed_is_named(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert run("infer.py", lambda: importlib.import_module(package)) == 2
    said = capsys.readouterr().err
    assert package in said and said.endswith("install what is needed with `pip install -r requirements.txt`\n")


def test_a_warning_is_said_once_in_a_run(capsys):
    def work():
        for text in ("two files", "no text", "two files"):
            warnings.warn(text, stacklevel=1)

    for _ in range(2):  # the second run says it again
        assert run("program", work) == 0
        assert capsys.readouterr().err == "program: two files\nprogram: no text\n"


def test_names_that_no_encoding_has_are_printed_all_the_same(monkeypatch):
    """A caption cut within an emoji, and a name in Latin-1 as Python reads it from a disk."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", errors="strict", write_through=True))
    assert run("train.py", lambda: print("a \ud83d cat", os.fsdecode(b"caf\xe9.png"))) == 0
    assert out.getvalue() == rb"a \ud83d cat caf\udce9.png" + b"\n"


@pytest.mark.parametrize(
    "error, said",
    [
        (BrokenPipeError(32, "Broken pipe"), "what reads the output has ended"),
        (OSError(28, "No space left on device"), "No space left on device: make room"),
        (OSError("000002.pt could not be written (failed)"), "000002.pt could not be written (failed): make room"),
        (PermissionError(13, "Permission denied", "a.json"), "Permission denied: 'a.json': change the permissions"),
        (OSError("[Errno 13] Permission denied: 'a.png'"), "Permission denied: 'a.png': change the permissions"),
        (OSError(30, "Read-only file system", "a"), "Read-only file system: 'a': change the permissions"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), "No such file or directory: 'a.png'\n"),
    ],
)
def test_only_a_full_disk_wants_room(error, said, capsys):
    def work():
        raise error

    for advice in ({}, {"disk_advice": "make room, or give another --out"}):
        assert run("train.py", work, **advice) == 2
        assert capsys.readouterr().err.startswith(f"train.py: {said}")
