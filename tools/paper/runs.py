"""Trainings by the settings of train.py, each done once, whoever needs it; they can be stopped at any time."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlnet.common.program import flag_of, note
from controlnet.training.convergence import Convergence
from controlnet.training.run_state import RunFolder

TRAIN = Path(__file__).parents[2] / "train.py"


@dataclass(frozen=True)
class Run:
    """A training that is done. `settings` are train.py's, by their names there."""

    path: Path
    settings: dict

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def control(self) -> Path:
        """Written after the last step: where it is, nothing is left to train."""
        return self.folder.control_at(self.settings["steps"])

    def log(self) -> list[dict]:
        return list(self.folder.logged())


def watched(log: Sequence[dict], name: str) -> list[tuple[int, object]]:
    """Steps and values of what is not logged at every step."""
    return [(line["step"], line[name]) for line in log if name in line]


def last_loss(log: Sequence[dict]) -> float:
    """The validation loss at the end."""
    return watched(log, "validation_loss")[-1][1]


def set_in(log: Sequence[dict]) -> int | None:
    """The step at which control sets in, as train.py says it."""
    convergence = Convergence(log[-1]["step"])
    for line in log:
        if "control_measure" in line:
            convergence.news(line["step"], line["validation_loss"], line["control_measure"])
    return convergence.set_in


def trained(folder: Path, settings: dict, fingerprint: str, device: str) -> Run:
    """The run in `folder` with these settings on the base with this fingerprint, trained as far as it is not.

    Raises ValueError if the training fails, KeyboardInterrupt if it is stopped.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    run = Run(folder / name_of(settings, fingerprint), settings)
    if not run.control.exists():
        note(f"training {run.path}")
        if status := launch(arguments(run, cache_of(folder, settings, fingerprint), device)):
            raise ValueError(f"train.py ended with status {status}, its own words are above: the same command goes on")
        shutil.rmtree(run.path / "state")  # from which it would go on: large, and of no more use
    return run


def name_of(settings: dict, fingerprint: str) -> str:
    """Readable where trainings differ most, with a hash of all that they depend on."""
    given = json.dumps({**settings, "base": fingerprint}, sort_keys=True)
    kind, short = settings.get("architecture", "full"), hashlib.sha256(given.encode()).hexdigest()[:8]
    return f"{settings['data']}-{kind}-{settings['seed']}-{short}"


def cache_of(folder: Path, settings: dict, fingerprint: str) -> Path | None:
    """Latents that trainings on the same images share."""
    if settings.get("no_cache"):
        return None
    return folder / f"latents-{settings['data']}-{settings['images']}-{settings['seed']}-{fingerprint}"


def arguments(run: Run, cache: Path | None, device: str) -> list[str]:
    """The command line of train.py. A run that was stopped goes on with its own settings."""
    given = ["--resume"]
    if not run.folder.states():
        flags = {flag_of(name): value for name, value in run.settings.items()}
        given = [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])]
    where = ["--out", str(run.path), "--device", device, "--keep", "1", "--save-every", "10m"]
    return [*given, *where, *(["--cache", str(cache)] if cache else [])]


def launch(argv: list[str]) -> int:
    """train.py as a program of its own, whose words go to the terminal -> its exit status."""
    command = [sys.executable, str(TRAIN), *argv]
    with subprocess.Popen(command, stdout=sys.stderr, start_new_session=True) as training:
        try:
            return training.wait()
        except KeyboardInterrupt:
            training.send_signal(signal.SIGINT)  # alone: it saves after its step, and a second one would hurry it
            training.wait()
            raise
