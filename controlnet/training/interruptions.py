"""What may interrupt a run from outside: signals, and the end of whatever reads its output."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import IO

from controlnet.common.program import note

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAVING = [getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name)]  # cluster managers warn by it


class Signals:
    """Within `with`, signals are noted: those that stop a run in `received`, the one that only saves in `save_asked`.

    Within `waiting`, a step ends and is saved before a run stops; elsewhere, and at a second Ctrl-C, a stop is a
    KeyboardInterrupt.
    """

    def __enter__(self) -> "Signals":
        self.received: signal.Signals | None = None
        self.save_asked = self.waits = False
        self.before = {number: signal.getsignal(number) for number in (*STOPPING, *SAVING)}
        for number, handler in self.before.items():
            if (number, handler) != (getattr(signal, "SIGHUP", None), signal.SIG_IGN):  # nohup is not overruled
                signal.signal(number, self.arrived)
        return self

    def arrived(self, number: int, frame) -> None:
        if number in SAVING:
            self.save_asked = True
            return
        at_once = not self.waits or (self.received is not None and number == signal.SIGINT)
        self.received = signal.Signals(number)
        if at_once:
            raise KeyboardInterrupt
        with suppress(RuntimeError):  # while a write to stderr waits for its reader, Python allows no other
            note("\nstopping after this step (Ctrl-C again: at once, without saving)")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def pop_save_request(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self.save_asked = self.save_asked, False
        return asked

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Lasting:
    """A stream to print to whose reader may go away, as with `| head` or a closed terminal: the run goes on."""

    def __init__(self, stream: IO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments) -> None:
        try:
            function(*arguments)
        except OSError:  # what is buffered goes nowhere, too, or Python would fail on it when it exits
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    with redirect_stdout(Lasting(sys.stdout)), redirect_stderr(Lasting(sys.stderr)):
        yield
