"""The tools as programs: each also starts as a script, and answers --help at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
SCRIPTS = sorted(path for path in TOOLS.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_takes_its_folder_off_the_path(path):
    """Or else `python tools/NAME.py` would take tools/describe.py for the standard library's module of this name.

    Before that it imports only what does not ask for that module.
    """
    before, line, _ = path.read_text().partition(
        f"if not __package__:  # for `python tools/{path.name}`; "
        "out of this folder, whose inspect.py is not Python's own\n"
        "    sys.path[0] = str(Path(__file__).resolve().parent.parent)\n"
    )
    assert line
    imported = {text.split()[1] for text in before.splitlines() if text.startswith(("import ", "from "))}
    program = f"import sys, {', '.join(imported)}; sys.exit('inspect' in sys.modules)"
    assert subprocess.run([sys.executable, "-S", "-c", program]).returncode == 0


def test_help_comes_without_torch(tmp_path):
    """It names every option, the program and an example."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for name in ("inspect", "convert", "transfer", "add_control", "merge", "download", "bench"):
        command = [sys.executable, str(TOOLS / f"{name}.py"), "--help"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"python -m tools.{name}") >= 2 and "--debug" in done.stdout
