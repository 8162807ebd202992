"""tools.download against a server on this machine that answers as Hugging Face does, and goes wrong as networks do."""

import hashlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ldm.stable_diffusion import PUBLISHED, file_names
from tools import download
from tools.download import MODELS, Model

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "mini.safetensors"
PAGE = f"/owner/mini/resolve/main/{NAME}"


class Hub(ThreadingHTTPServer):
    """Leads from the file's page to its bytes, and tells size and SHA-256 on the page alone."""

    daemon_threads = True
    content, sha256 = CONTENT, SHA256
    added = b""  # sent beyond the length that was told
    ranges = True  # whether parts can be asked for
    cuts = ()  # after how many bytes the next connections break off
    status = None  # of an error for every request

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked = []  # (method, path, Range)

    def handle_error(self, request, client_address):
        """Connections that the client closed are no news."""


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.server.asked.append((self.command, self.path, self.headers["Range"]))
        if self.server.status or self.path not in (PAGE, "/bytes"):
            self.reply(self.server.status or 404, {})
        elif self.path == PAGE:
            told = {"X-Linked-Etag": f'"{self.server.sha256}"', "X-Linked-Size": len(self.server.content)}
            self.reply(302, {"Location": "/bytes", **(told if self.server.sha256 else {})})
        else:
            self.send_bytes()

    do_HEAD = do_GET

    def send_bytes(self):
        content, status = self.server.content, 200
        if self.command == "GET":
            content += self.server.added
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if asked and self.server.ranges:
            content, status = content[int(asked.group(1)) :], 206
        length = len(content)
        if self.command == "GET" and self.server.cuts:
            content, self.server.cuts = content[: self.server.cuts[0]], self.server.cuts[1:]
        self.reply(status, {}, content, length)

    def reply(self, status, headers, content=b"", length=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setitem(MODELS, "mini", Model("owner/mini", NAME, 0.001, "none"))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(hub, folder, *argv):
    return download.main(["mini", "--to", str(folder), "--home", f"http://127.0.0.1:{hub.server_port}", *argv])


def error(hub, folder, capsys, *argv):
    """The sentence of a run that fails."""
    assert run(hub, folder, *argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def ranges(hub):
    """What was asked for of the bytes themselves."""
    return [asked for method, path, asked in hub.asked if method == "GET" and path == "/bytes"]


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_arrives_and_is_left_alone_afterwards(hub, tmp_path, capsys):
    assert run(hub, tmp_path / "weights") == 0
    path = tmp_path / "weights" / NAME
    assert path.read_bytes() == CONTENT and names(path.parent) == [NAME]
    assert capsys.readouterr().out == f"{path}\n"
    count = len(hub.asked)
    assert run(hub, tmp_path / "weights") == 0
    assert len(hub.asked) == count and "is there already" in capsys.readouterr().err
    path.write_text("old")
    assert run(hub, tmp_path / "weights", "--force") == 0
    assert path.read_bytes() == CONTENT


def test_a_part_is_not_fetched_again(hub, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:5000])
    assert run(hub, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT and names(tmp_path) == [NAME]
    assert ranges(hub) == ["bytes=5000-"]


def test_broken_connections_are_taken_up_again(hub, tmp_path):
    hub.cuts = (1000, 0, 2000)
    assert run(hub, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert ranges(hub) == [None, "bytes=1000-", "bytes=1000-", "bytes=3000-"]


def test_after_a_few_tries_the_part_is_kept_for_the_next_time(hub, tmp_path, capsys):
    hub.cuts = (1000, *[0] * download.TRIES)
    assert "goes on from there" in error(hub, tmp_path, capsys)
    assert names(tmp_path) == [f"{NAME}.part"]
    assert run(hub, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT and ranges(hub)[-1] == "bytes=1000-"


def test_a_server_without_ranges_is_asked_for_all(hub, tmp_path):
    hub.ranges = False
    hub.cuts = (1000,)
    assert run(hub, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 1])
def test_a_part_that_is_whole_or_too_long(hub, tmp_path, size):
    (tmp_path / f"{NAME}.part").write_bytes((CONTENT + b"x")[:size])
    assert run(hub, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert ranges(hub) == ([] if size == len(CONTENT) else [None])


def test_a_damaged_file_never_gets_its_name(hub, tmp_path, capsys):
    hub.content = CONTENT[:-1] + b"x"
    assert "did not arrive whole" in error(hub, tmp_path, capsys)
    assert not names(tmp_path)
    hub.content = CONTENT
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1000)  # of another file
    assert "did not arrive whole" in error(hub, tmp_path, capsys)
    assert run(hub, tmp_path) == 0


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_more_than_was_told_is_not_taken(hub, tmp_path, capsys, sha256):
    hub.sha256, hub.added = sha256, b"more"
    assert "did not arrive whole" in error(hub, tmp_path, capsys)
    assert not names(tmp_path)


def test_a_known_checksum_comes_before_the_servers(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "mini", Model("owner/mini", NAME, 0.001, "none", "0" * 64))
    assert "another SHA-256" in error(hub, tmp_path, capsys)
    assert not ranges(hub) and not names(tmp_path)


def test_without_any_checksum_the_size_decides_and_that_is_said(hub, tmp_path, capsys):
    hub.sha256 = None
    assert run(hub, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert "only its size was checked" in capsys.readouterr().err


def test_what_the_server_refuses(hub, tmp_path, capsys):
    hub.status = 404
    sentence = error(hub, tmp_path, capsys)
    assert "404" in sentence and PAGE in sentence and str(tmp_path / NAME) in sentence
    assert not names(tmp_path)


def test_no_network(hub, tmp_path, capsys):
    with socket.socket() as taken:  # bound and not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        home = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert download.main(["mini", "--to", str(tmp_path), "--home", home]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "there is no connection to 127.0.0.1" in sentence and "by other means" in sentence
    assert not names(tmp_path)


def test_a_full_disk_is_noticed_before(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("", (), {"free": len(CONTENT) - 1}))
    assert "make room" in error(hub, tmp_path, capsys)
    assert not ranges(hub)
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1])
    assert run(hub, tmp_path) == 0


def test_a_stop_keeps_the_part(hub, tmp_path, capsys, monkeypatch):
    receive = download.receive

    def stop(*arguments):
        hub.cuts = (1000,)
        receive(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "receive", stop)
    assert run(hub, tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert names(tmp_path) == [f"{NAME}.part"]


def test_names(capsys, tmp_path):
    for argv, words in ((["sd16"], '"sd16" is no model'), ([], "there is no NAME")):
        assert download.main([*argv, "--to", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    assert download.main(["sd15", "--to", str(tmp_path), "--home", "file:///etc"]) == 2
    assert "--home" in capsys.readouterr().err
    assert download.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MODELS)
    assert len(download.chosen(["controls", "canny", "sd15"])) == 15


def test_what_is_downloaded_is_found(monkeypatch, tmp_path):
    """Bases under their presets' names, from where StableDiffusion says; controls under their short names."""
    from controlnet.inference.inputs import find_control
    from ldm.config import SD15

    for name in ("sd15", "sd21", "sd21-base"):
        assert MODELS[name].file in file_names(name)
        assert f"`python -m tools.download {name}`" in PUBLISHED[name].origin
        assert PUBLISHED[name].origin.endswith(f"/{MODELS[name].repository}")
    monkeypatch.setattr("ldm.stable_diffusion.WEIGHTS", tmp_path)
    for name in download.CONTROLS:
        (tmp_path / MODELS[name].file).touch()
        assert find_control(name, SD15) == tmp_path / MODELS[name].file
