"""tools.download with a library that gives, breaks off and lies as a network does."""

import hashlib
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest

from controlnet.checkpoint import find_control
from ldm.checkpoints.published import file_names, origin
from ldm.config import SD15
from tools import download
from tools.download import MODELS, Model

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "mini.safetensors"


@pytest.fixture
def hub(monkeypatch):
    """In place of huggingface_hub.file_download. `stop_at` is where http_get fails, `asked` where it began."""
    hub = SimpleNamespace(content=CONTENT, etag=SHA256, stop_at=None, error=ConnectionError("lost"), asked=[])

    def http_get(url, file, resume_size, expected_size, displayed_filename):
        hub.asked.append(resume_size)
        file.write(hub.content[resume_size : hub.stop_at])
        if hub.stop_at is not None:
            raise hub.error

    hub.http_get = http_get
    hub.hf_hub_url = lambda repository, file: f"https://hub/{repository}/{file}"
    hub.get_hf_file_metadata = lambda url: SimpleNamespace(location=url, etag=hub.etag, size=len(CONTENT))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(file_download=hub))
    monkeypatch.setitem(MODELS, "mini", Model("owner/mini", NAME, 0.001, "none"))
    return hub


def run(folder, *argv):
    return download.main(["mini", "--to", str(folder), *argv])


def error(folder, capsys):
    """The sentence of a run that fails."""
    assert run(folder) == 2
    return capsys.readouterr().err.splitlines()[-1]


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_arrives_and_is_left_alone_afterwards(hub, tmp_path, capsys):
    path = tmp_path / "weights" / NAME
    assert run(path.parent) == 0
    assert path.read_bytes() == CONTENT and names(path.parent) == [NAME]
    assert capsys.readouterr().out == f"{path}\n"
    path.write_text("old")
    assert run(path.parent) == 0
    assert path.read_text() == "old" and "exists" in capsys.readouterr().err
    assert run(path.parent, "--force") == 0
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("stop, status", [(ConnectionError("lost"), 2), (KeyboardInterrupt(), 130)])
def test_what_was_cut_off_continues(hub, tmp_path, capsys, stop, status):
    hub.stop_at, hub.error = 1000, stop
    assert run(tmp_path) == status
    assert names(tmp_path) == [f"{NAME}.part"]
    said = capsys.readouterr().err
    assert ("(lost): repeat the command" in said and NAME in said) or "the same command continues" in said
    hub.stop_at = None
    assert run(tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT and names(tmp_path) == [NAME] and hub.asked == [0, 1000]


def test_a_part_that_is_too_long_is_of_another_file(hub, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT + b"x")
    assert run(tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT and hub.asked == [0]


def test_a_damaged_file_never_gets_its_name(hub, tmp_path, capsys):
    hub.content = CONTENT[:-1] + b"x"
    assert "arrived damaged" in error(tmp_path, capsys)
    assert not names(tmp_path)


def test_what_is_refused_before_anything_is_fetched(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(download.PINNED_SHA256, "mini", "0" * 64)
    assert "another SHA-256" in error(tmp_path, capsys)
    monkeypatch.setitem(download.PINNED_SHA256, "mini", SHA256)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=len(CONTENT) - 1))
    assert "are free on the disk" in error(tmp_path, capsys)
    hub.etag = "5d41402abc4b2a76b9719d911017c592"
    assert "does not state" in error(tmp_path, capsys)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "`pip install huggingface_hub`" in error(tmp_path, capsys)
    assert not hub.asked and not names(tmp_path)


BAD_SERVERS = {
    # what a GET is answered with: status, bytes, whether the connection then breaks
    "without end": (200, CONTENT * 1000, False, "sends more than the 10240 bytes that it states"),
    "from the start again and again": (200, CONTENT[:100], True, "the server begins again and again"),
    "nothing": (206, b"", True, "repeat the command"),
    "416": (416, b"", False, "repeat the command"),
    "another file": (200, bytes(len(CONTENT)), False, "arrived damaged"),
}


@pytest.mark.parametrize("kind", BAD_SERVERS)
def test_servers_that_lie_through_the_real_library(kind, tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub.file_download")
    status, data, breaks, words = BAD_SERVERS[kind]

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.send_header("ETag", f'"{SHA256}"')
            self.end_headers()

        def do_GET(self):
            self.send_response(status)
            if breaks:  # less than it states
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds that shutdown waits for
        monkeypatch.setattr(hub, "hf_hub_url", lambda *_: f"http://127.0.0.1:{server.server_port}/file")
        monkeypatch.setattr(hub.time, "sleep", lambda _: None)
        monkeypatch.setattr(hub.constants, "DOWNLOAD_CHUNK_SIZE", 50)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # this server is here; test_interop.py sets it
        monkeypatch.setitem(MODELS, "mini", Model("owner/mini", NAME, 0.001, "none"))
        (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:50])
        assert words in error(tmp_path, capsys)
        server.shutdown()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= len(CONTENT) and NAME not in names(tmp_path)


@pytest.mark.parametrize("size", [10**400, 10**9, 2 * 10**6])
def test_a_size_that_the_model_has_not(hub, tmp_path, capsys, size):
    hub.get_hf_file_metadata = lambda url: SimpleNamespace(location=url, etag=SHA256, size=size)
    assert "bytes, expected 0.001 GB" in error(tmp_path, capsys)
    assert not names(tmp_path) and not hub.asked


def test_names(capsys, tmp_path):
    for argv, words in ((["sd16"], '"sd16" is not a known model'), ([], "there is no NAME")):
        assert download.main([*argv, "--to", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    assert download.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MODELS)
    assert len(download.chosen(["controls", "canny", "sd15"])) == 15


def test_what_is_downloaded_is_found(monkeypatch, tmp_path):
    """Bases under their presets' names, from where StableDiffusion says; controls under their short names."""
    for name in ("sd15", "sd21", "sd21-base"):
        assert MODELS[name].file in file_names(name)
        assert f"`python -m tools.download {name}`" in origin(name)
        assert origin(name).endswith(f"/{MODELS[name].repository}")
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", tmp_path)
    for name in download.CONTROLS:
        (tmp_path / MODELS[name].file).touch()
        assert find_control(name, SD15.unet) == tmp_path / MODELS[name].file
