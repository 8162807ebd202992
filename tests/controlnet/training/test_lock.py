"""One process at a time in a folder."""

import multiprocessing
import os
import signal
import time

import pytest

from controlnet.training import lock
from controlnet.training.lock import locked

CONTEXT = multiprocessing.get_context("fork")


def hold(folder, ready, until):
    with locked(folder):
        ready.set()
        until.wait(60)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that has a folder of the test, until an event."""
    started = []

    def start(until):
        ready = CONTEXT.Event()
        process = CONTEXT.Process(target=hold, args=(tmp_path / "run", ready, until))
        process.start()
        started.append(process)
        assert ready.wait(30)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_folder_that_is_taken_is_refused_until_its_holder_is_killed(tmp_path, holder):
    folder = tmp_path / "run"
    process = holder(until=CONTEXT.Event())
    words = f'^".*" is being written by process {process.pid} on .* since 2.*:.*: wait for its end'
    with pytest.raises(ValueError, match=words) as caught, locked(folder):
        pass
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_who_waits_comes_next(tmp_path, holder, monkeypatch):
    tried, said, until = [], [], CONTEXT.Event()
    process = holder(until)
    monkeypatch.setattr(lock, "note", said.append)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: tried.append(seconds) or len(tried) == 3 and until.set())
    with locked(tmp_path / "run", wait=True):
        process.join(5)
        assert process.exitcode == 0 and len(tried) >= 3
    assert len(said) == 1 and f" by process {process.pid} on " in said[0]


def test_what_a_holder_has_forked_does_not_hold(tmp_path):
    """Data workers live on for some seconds when the training is killed."""
    with locked(tmp_path):
        worker = CONTEXT.Process(target=time.sleep, args=(60,))
        worker.start()
    at_once = CONTEXT.Event()
    at_once.set()
    other = CONTEXT.Process(target=hold, args=(tmp_path, CONTEXT.Event(), at_once))
    other.start()
    other.join()
    worker.kill()
    worker.join()
    assert other.exitcode == 0


@pytest.mark.skipif(lock.fcntl is None, reason="Windows does not tell who holds a lock")
def test_the_system_tells_who_holds_a_folder(tmp_path, holder):
    folder = tmp_path / "run"
    assert lock.holder(folder) is None
    process = holder(until=CONTEXT.Event())
    assert lock.holder(folder) == process.pid
    written = (folder / lock.LOCK_NAME).read_text()
    (folder / lock.LOCK_NAME).write_text("process 1 on another-machine since 2026-01-01 00:00:00")
    assert lock.holder(folder) is None  # a process of that number here is another one
    (folder / lock.LOCK_NAME).write_text(written.replace(str(process.pid), "1"))  # its number in a container
    assert lock.holder(folder) == process.pid
    process.kill()
    process.join()
    assert lock.holder(folder) is None
