"""The trainings in a folder: how they stand, read from what they write; started and stopped as on a command line."""

import os
import shlex
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

from controlnet.common.program import flag_of, printable
from controlnet.training.lock import holder
from controlnet.training.run_state import RunFolder
from controlnet.worlds import WORLDS

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = "output.txt"  # in a run's folder: what a training says that was started here
LAST = 3000  # bytes of it


class Trainings:
    def __init__(self, folder: Path):
        self.folder = folder
        self.watched: dict[str, tuple[int, float]] = {}  # at which step a run was seen first, and when
        self.started: dict[str, subprocess.Popen] = {}

    def names(self) -> list[str]:
        """The run that has changed last comes first."""
        found = {path.parent for name in ("settings.json", OUTPUT) for path in self.folder.glob(f"[!.-]*/{name}")}
        return [path.name for path in sorted(found, key=lambda path: -newest(path))]

    def run(self, name: str) -> RunFolder:
        """A run here, which may not have begun. Raises ValueError for what cannot be the name of its folder."""
        if not name:
            raise ValueError("no run is named: choose one, or give a new one a name")
        if Path(name).name != name or name.startswith((".", "-")):
            raise ValueError(f'"{name}" cannot name a run, expected a name like "control": a folder in {self.folder}')
        return RunFolder(self.folder / name)

    def status(self, name: str) -> str:
        run, lines = self.run(name), log_of(self.run(name))
        step, process = lines[-1]["step"] if lines else 0, self.process(name)
        steps = settings_of(run).get("steps", "?")
        if process is None:
            self.watched.pop(name, None)
            return f"ended after step {step} of {steps}" if lines else "not running; no step is done"
        if not lines:
            return f"preparing its data; process {process}"
        begun, since = self.watched.setdefault(name, (step, time.monotonic()))
        if step > begun and steps != "?":
            left = (steps - step) * (time.monotonic() - since) / (step - begun)
            return f"step {step} of {steps}, about {left / 60:.1f} minutes left; process {process}"
        return f"step {step} of {steps}; process {process}"

    def process(self, name: str) -> int | None:
        """Of the one that trains it on this machine, also if it was started here and has not yet taken its lock."""
        started = self.started.get(name)
        if started and started.poll() is None:
            return started.pid
        return holder(self.run(name).path)

    def stop(self, name: str) -> None:
        """As Ctrl-C: it saves and ends. Raises ValueError if it does not run on this machine."""
        process = self.process(name)
        if process is None:
            raise ValueError(f'no process of this machine trains "{name}": it has ended, or runs elsewhere')
        os.kill(process, signal.SIGTERM)

    def start(self, name: str, given: dict) -> None:
        """As on a command line, in a session of its own: it goes on when the page ends."""
        folder, arguments = self.run(name).path, self.arguments(name, given)
        if self.process(name):
            raise ValueError(f'"{name}" is being trained: stop it first, or give another name')
        folder.mkdir(exist_ok=True)
        with open(folder / OUTPUT, "wb") as output:
            command = [sys.executable, str(ROOT / "train.py"), *arguments]
            output.write(f"{shown(arguments)}\n\n".encode())
            output.flush()
            said = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            self.started[name] = subprocess.Popen(command, **said, start_new_session=True)

    def arguments(self, name: str, given: dict) -> list[str]:
        """Of train.py, for those of its settings that are given; each in one piece: no value is taken for an option."""
        values = {**given, "out": self.run(name).path}.items()
        return [flag_of(name) if value is True else f"{flag_of(name)}={value}" for name, value in values if value]

    def output(self, name: str) -> str:
        """The last lines that it said; of a progress bar, how it looks now."""
        path = self.run(name).path / OUTPUT
        if not path.is_file():
            return ""
        with open(path, "rb") as output:
            output.seek(max(0, path.stat().st_size - LAST))
            lines = output.read().decode(errors="replace").split("\n")
        return "\n".join(printable(line.rstrip("\r").split("\r")[-1]) for line in lines[-12:]).strip()


def shown(arguments: list[str]) -> str:
    """To be typed into a terminal."""
    return shlex.join(["python", "train.py", *arguments])


def datasets() -> list[str]:
    return [*WORLDS, *sorted(str(path) for path in Path("data").glob("*") if path.is_dir())]


def newest(run: Path) -> float:
    return max(path.stat().st_mtime for path in run.iterdir() if path.is_file())


def settings_of(run: RunFolder) -> dict:
    try:
        return run.written()["settings"]
    except ValueError:  # not begun yet
        return {}


def log_of(run: RunFolder) -> list[dict]:
    """The lines of its log, by their steps."""
    if not run.log_file.is_file():
        return []
    found = run.log_file.stat()
    return read_log(run.log_file, found.st_size, found.st_mtime)


@lru_cache(maxsize=1)
def read_log(file: Path, size: int, changed: float) -> list[dict]:
    return list(RunFolder(file.parent).logged())
