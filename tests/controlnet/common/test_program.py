"""What the programs share: threads that sleep, options as fields, settings read back from files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_train_sets_the_policy_before_it_imports_pytorch():
    lines = (ROOT / "train.py").read_text().splitlines()
    assert lines.index("    share_cores()") < lines.index("import torch")


@pytest.mark.parametrize(
    "name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "1")]
)
def test_what_the_user_has_set_stays(name, value):
    want = [value if n == name else None for n in POLICY]
    assert policy_after(HELP, **{name: value}) == f"False {want}"
