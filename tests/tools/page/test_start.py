"""How the page is started, without a browser."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest

from tools.page import __main__ as program

pytest.importorskip("gradio", reason="the page needs gradio")


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """Every port is, as gradio has it."""

    def launch(**_):
        raise OSError("Cannot find empty port in range")

    blocks = SimpleNamespace(launch=launch)
    layout = SimpleNamespace(CSS="", THEME=None, page=lambda *_: blocks)
    monkeypatch.setitem(sys.modules, "tools.page.layout", layout)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("port, words", [("99999", "expected one up to 65535"), ("7860", "port 7860 is taken")])
def test_a_port_that_cannot_be_had_is_a_sentence(taken, capsys, port, words):
    assert program.main(["--port", port]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.out == ""  # above all no address


def test_pictures_wait_in_the_studio_and_all_else_for_its_turn(tmp_path, monkeypatch):
    """So that no two visitors start a training of one name."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from tools.page.layout import page

    (tmp_path / "runs").mkdir()
    blocks = page(tmp_path, tmp_path / "runs")
    unlimited = [event.name for event in blocks.fns.values() if event.concurrency_limit is None]
    assert sorted(unlimited) == ["draw", "draw", "draw_another"] and blocks._queue.default_concurrency_limit == 1
    assert [event.concurrency_id for event in blocks.fns.values()].count("start") == 2  # "start" and "go on"
