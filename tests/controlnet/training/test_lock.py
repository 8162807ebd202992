"""One process at a time in a folder."""

import multiprocessing
import os
import signal
import time

import pytest

from controlnet.training import lock
from controlnet.training.lock import locked


def hold(folder, ready, seconds):
    with locked(folder):
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that has a folder of the test, a folder of its own."""
    started = []

    def start(seconds=60.0):
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        process = context.Process(target=hold, args=(tmp_path / "run", ready, seconds))
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
    process = holder()
    words = f'^".*" is being written by process {process.pid} on .* since 2.*:.*: wait for its end'
    with pytest.raises(ValueError, match=words) as caught, locked(folder):
        pass
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_who_waits_comes_next(tmp_path, holder, capsys):
    process = holder(seconds=0.5)
    with locked(tmp_path / "run", wait=True):
        assert capsys.readouterr().err.count(f" by process {process.pid} on ") == 1
        process.join(5)
        assert process.exitcode == 0


def test_what_a_holder_has_forked_does_not_hold(tmp_path):
    """Data workers live on for some seconds when the training is killed."""
    context = multiprocessing.get_context("fork")
    with locked(tmp_path):
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
    other = context.Process(target=hold, args=(tmp_path, context.Event(), 0))
    other.start()
    other.join()
    worker.kill()
    worker.join()
    assert other.exitcode == 0


@pytest.mark.skipif(lock.fcntl is None, reason="Windows does not tell who holds a lock")
def test_the_system_tells_who_holds_a_folder(tmp_path, holder):
    folder = tmp_path / "run"
    assert lock.holder(folder) is None
    process = holder()
    assert lock.holder(folder) == process.pid
    written = (folder / lock.LOCK_NAME).read_text()
    (folder / lock.LOCK_NAME).write_text("process 1 on another-machine since 2026-01-01 00:00:00")
    assert lock.holder(folder) is None  # a process of that number here is another one
    (folder / lock.LOCK_NAME).write_text(written)
    process.kill()
    process.join()
    assert lock.holder(folder) is None
