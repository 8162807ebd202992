"""The tools as programs: each answers --help, most of them without waiting for PyTorch."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = {path.stem for path in (ROOT / "tools").glob("*.py") if "new_parser(" in path.read_text()} | {"page", "paper"}
WITH_TORCH = {"convergence", "evaluate", "judge", "pretrain", "strip"}
ASK_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"tools.{name}" + ".__main__" * (name in ("page", "paper"))).main(["--help"])
    except SystemExit as stop:
        assert not stop.code, stop.code
"""


def test_help_comes_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    names = sorted(TOOLS - WITH_TORCH)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", ASK_ALL, *names]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_help(done.stdout, names)


def test_help_of_those_that_need_torch(capsys):
    for name in WITH_TORCH:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(f"tools.{name}").main(["--help"])
        assert stop.value.code == 0
    check_help(capsys.readouterr().out, WITH_TORCH)


@pytest.mark.parametrize("words", ["strip --out", "convergence --out", "check_data . --sheet"])
def test_a_picture_is_a_png_in_a_place_that_is_seen_before_the_work(tmp_path, capsys, words):
    (tmp_path / "a.jpg").write_text("precious")
    (tmp_path / "a.png").write_text("")
    name, *options = words.split()
    main = importlib.import_module(f"tools.{name}").main
    for out, found in (("a.jpg", "expected the name of a file ending in .png"), ("a.png/b.png", "not a folder that")):
        assert main([*options, str(tmp_path / out)]) == 2
        assert found in capsys.readouterr().err
    assert (tmp_path / "a.jpg").read_text() == "precious"


def test_a_picture_that_is_replaced_is_named(tmp_path, capsys):
    (tmp_path / "a.png").write_text("")
    importlib.import_module("tools.convergence").main([str(tmp_path), "--out", str(tmp_path / "a.png")])
    assert f"{tmp_path / 'a.png'} will be replaced" in capsys.readouterr().err


EMPTY = [
    "accept --out", "bench --folder", "check_data", "check_data . --sheet", "convergence", "convergence --out",
    "convert a --out", "download sd15 --to", "judge --out", "make_data scenes --out", "make_hints canny .",
    "page --out", "page --runs", "paper --out", "pretrain --out", "pretrain --start", "strip --out", "strip --weights",
]  # fmt: skip


@pytest.mark.parametrize("words", EMPTY)
def test_an_empty_path_is_not_the_current_folder(capsys, words):
    name, *options = words.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"tools.{name}" + ".__main__" * (name in ("page", "paper"))).main([*options, ""])
    assert stop.value.code == 2
    assert "it is empty, expected a path" in capsys.readouterr().err


def check_help(text, names):
    """It names the program, an example and --debug."""
    for name in names:
        assert text.count(f"python -m tools.{name}") >= 2, name
    assert text.count("show where an error comes from") == len(names)
