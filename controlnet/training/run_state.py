"""What a training run leaves on disk, always whole, and how it goes on from there.

OUT/settings.json          every setting and the versions, by which --resume knows the run
OUT/log.jsonl              a JSON object for every step
OUT/samples/000250.png     grids of validation hints
OUT/control.safetensors    the ControlNet, as other programs read it
OUT/state/000250.pt        everything that a step depends on, the newest few of them

A state holds the number of steps done, the ControlNet's parameters, the states of optimizer, learning-rate schedule and
loss scaler, the position in the data, and, where there are any, the unlocked decoder and the EMA. It has no random
states: all that is random follows from the seed and the position (objective.py).
"""

import json
import os
import platform
import signal
import sys
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from controlnet.common.program import flag_of
from ldm.checkpoints.files import new_file

from .options import TrainSettings

PACKAGES = ("torch", "torchvision", "numpy", "safetensors")


def write_text(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text)


def save_state(path: Path, step: int, **parts) -> None:
    """Writes `step` and the `state_dict` of each part to `path`. Raises OSError if that fails."""
    try:
        with new_file(path) as temporary, open(temporary, "wb") as file:
            torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, file)
            file.flush()
            os.fsync(file.fileno())  # the renaming must not reach the disk before the contents do
    except RuntimeError as error:  # PyTorch's way to say that a disk is full
        raise OSError(f"{path} could not be written ({error})") from error


def load_state(path: Path, **parts) -> int:
    """Restores the parts in place and returns the number of steps done.

    Raises ValueError if the file is damaged or of another run (another base, another precision); some parts may have
    changed by then.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step = state.pop("step")
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise ValueError(
            f"{path} is not a run's state or it is damaged: remove it, to go on from the one before it if there is one"
        ) from error
    if state.keys() != parts.keys():
        raise ValueError(f"{path} holds {sorted(state)}, but this run needs {sorted(parts)}: it is another kind of run")
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the {name} in {path} does not fit: resume with the base and the precision that the run started with"
            ) from error
    return step


class RunFolder:
    """The folder of one run. Only one of several processes may write to it."""

    def __init__(self, path: Path):
        self.path = path
        self.settings_file, self.log_file = path / "settings.json", path / "log.jsonl"
        self.control, self.base = path / "control.safetensors", path / "base.safetensors"

    def states(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / "state").glob("[0-9]*.pt"), key=lambda path: int(path.stem))

    def grid(self, step: int) -> Path:
        return self.path / "samples" / f"{step:06d}.png"

    def check_new(self) -> None:
        """Raises ValueError rather than write over another run."""
        if self.states() or self.control.exists():
            raise ValueError(f"{self.path} holds a run already: go on with --resume, or give another folder as --out")

    def written(self) -> dict:
        """settings.json of the run to resume. Raises ValueError if there is none."""
        if not self.settings_file.exists():
            raise ValueError(
                f"there is no run to resume in {self.path}, expected {self.settings_file}: leave out --resume"
            )
        try:
            written = json.loads(self.settings_file.read_text())
            return {"settings": dict(written["settings"]), "data": dict(written["data"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.settings_file} is damaged ({error!r}): start another run, with --control "
                f"{self.control} to go on from what was learned"
            ) from error

    def check_fixed(self, given: dict, before: dict) -> None:
        """Raises ValueError if a command line gives another value for what a run started with and must keep."""
        for item in fields(TrainSettings):
            name = item.name
            if item.metadata["fixed"] and name in given and given[name] != before.get(name, given[name]):
                raise ValueError(
                    f"the run in {self.path} was started with {flag_of(name)} {before[name]}, not {given[name]}: "
                    "leave it out, or start another run in another folder"
                )

    def begin(self, step: int, settings: TrainSettings, data: dict) -> None:
        """Writes settings.json, or finds the same `data` (a fingerprint) in that of the run that goes on at `step`."""
        before = self.written()["data"] if step else data
        if before != data:
            changed = [key for key in data if data[key] != before.get(key)]
            what = ", ".join(f"{key} was {before.get(key)} and is {data[key]}" for key in changed)
            raise ValueError(f"the data or the base of the run in {self.path} have changed ({what}): start another run")
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "state").mkdir(exist_ok=True)
        passing = {item.name for item in fields(settings) if item.metadata.get("passing")}
        kept = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(settings).items()
            if name not in passing
        }
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        text = json.dumps({"settings": kept, "data": data, "versions": versions}, indent=2)
        write_text(self.settings_file, text + "\n")
        self.cut_log(step)

    def log(self, values: dict) -> None:
        with open(self.log_file, "a") as file:
            file.write(json.dumps(values) + "\n")

    def cut_log(self, step: int) -> None:
        """Drops log lines after `step`: a run that was killed will do these steps again."""
        if self.log_file.exists():
            lines = [line for line in self.log_file.read_text().splitlines() if logged_step(line) <= step]
            write_text(self.log_file, "".join(line + "\n" for line in lines))

    def save(self, step: int, keep: int, **parts) -> None:
        """The state after `step`, and no more than the newest `keep`."""
        save_state(self.path / "state" / f"{step:06d}.pt", step, **parts)
        for path in self.states()[:-keep]:
            path.unlink()

    def load(self, **parts) -> int:
        """-> the number of steps that are done: 0 for a run that was stopped before it had saved any."""
        return load_state(self.states()[-1], **parts) if self.states() else 0


def logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that was being written
        return float("inf")


class Progress:
    """Where a run reports: the progress bar, log.jsonl and, if asked for and installed, TensorBoard."""

    def __init__(self, run: RunFolder, bar: tqdm, tensorboard: bool = False):
        self.run, self.bar, self.validation_loss, self.loss = run, bar, None, None
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run.path / "tensorboard")

    def log(self, values: dict) -> None:
        """`values` of one step: numbers and lists of numbers, by name."""
        self.run.log(values)
        step, loss = values["step"], values["loss"]
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss  # smooth enough to read
        self.validation_loss = values.get("validation_loss", self.validation_loss)
        shown = {"loss": f"{self.loss:.4f}", "lr": f"{values['lr']:.1e}", "img/s": f"{values['images_per_second']:.1f}"}
        if self.validation_loss is not None:
            shown["validation"] = f"{self.validation_loss:.4f}"
        self.bar.set_postfix(shown | {"GB": f"{values['memory_gb']:.1f}"}, refresh=False)
        measures = [
            f"{name} {values[name]:.3f}" for name in ("validation_loss", "iou", "keypoint_distance") if name in values
        ]
        if "iou" in values:
            tqdm.write(f"step {step}: loss {self.loss:.4f}, {', '.join(measures)}")
        if self.board is not None:
            for name, value in values.items():
                for i, number in enumerate(value if isinstance(value, list) else [value]):
                    self.board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, number, step)


class StopSignals:
    """Within `with`, Ctrl-C and SIGTERM are noted in `received`, so that a step can end and be saved. A second Ctrl-C
    does not wait."""

    def __enter__(self) -> "StopSignals":
        self.received: signal.Signals | None = None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print("\nstopping after this step (Ctrl-C again: at once, without saving)", file=sys.stderr)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclass
class Position:
    """How many samples the run has looked at: the position in the data that comes next."""

    seen: int = 0

    def state_dict(self) -> dict:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"]
