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
