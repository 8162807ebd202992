"""What a training run leaves on disk, always whole, and how it goes on from there.

OUT/settings.json          every setting and the versions, by which --resume knows the run
OUT/log.jsonl              a JSON object for every step
OUT/report.html            the log as curves, with all grids
OUT/samples/000250.png     grids of validation hints
OUT/control.safetensors    the ControlNet, as other programs read it: as of the last save
OUT/control-000250.safetensors, control-best.safetensors: of each state, and of the save with the lowest validation loss
OUT/base.safetensors       with --sd-unlocked: the base with the decoder as of the last save
OUT/state/000250.pt        everything that a step depends on, the newest few of them
OUT/cache/                 latents (latent_cache.py), unless --cache names another folder
OUT/example.png            a hint to try it on (.npy of channels that no image has), or with --detect an image, to
                           inpaint with its example-mask.png
OUT/tensorboard/           with --log tensorboard
OUT/tracker-id             by which wandb or trackio know the run
OUT/.lock                  which process writes there (lock.py)

A state holds the number of steps done, the ControlNet's parameters, the states of optimizer, learning-rate schedule and
loss scaler, the position in the data, the lowest validation loss, and, where there are any, the unlocked decoder and
the EMA. It has no random states: all that is random follows from the seed and the position (objective.py).
"""

import json
import math
import os
import platform
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch

from controlnet.common.errors import out_of_memory
from controlnet.common.program import flag_of, note
from ldm.checkpoints.files import new_file, new_link, remove_leftovers

from .distributed import launch
from .identity import differences
from .lock import locked
from .options import TrainSettings

PACKAGES = ("torch", "torchvision", "numpy", "safetensors")


def write_text(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


class DamagedState(ValueError):
    """A file that cannot be read as the state of any run."""


def state_of(step: int, parts: dict) -> dict:
    return {"step": step, **{name: part.state_dict() for name, part in parts.items()}}


def write_state(path: Path, state: dict) -> None:
    """Raises OSError if that fails."""
    try:
        with new_file(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the renaming must not reach the disk before the contents do
    except RuntimeError as error:  # PyTorch's way to say that a disk is full
        raise OSError(f"{path} could not be written ({error})") from error


def read_state(path: Path) -> dict:
    """What `write_state` wrote, on the CPU. Raises DamagedState."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # by its checksums, which PyTorch does not look at
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {"step": state.pop("step"), **state}
    except Exception as error:  # a damaged file makes the reader raise almost anything
        if out_of_memory(error) or isinstance(error, PermissionError):
            raise
        raise DamagedState(
            f"{path} is not a run's state or it is damaged: remove it, to go on from another or to start again"
        ) from error


def restore(path: Path, state: dict, parts: dict) -> int:
    """Puts the state that was read from `path` into the parts and returns the number of steps done.

    Raises ValueError if it is of another run (another base, another precision); some parts may have changed by then.
    """
    found = state.keys() - {"step"}
    if found != parts.keys():
        raise ValueError(f"{path} holds {sorted(found)}, but this run needs {sorted(parts)}: it is another kind of run")
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the {name} in {path} does not fit: resume with the base and the precision that the run started with"
            ) from error
    return state["step"]


class RunFolder:
    """The folder of one run. Only one of several processes may write to it."""

    def __init__(self, path: Path):
        self.path = path
        self.settings_file, self.log_file = path / "settings.json", path / "log.jsonl"
        self.control, self.base = path / "control.safetensors", path / "base.safetensors"
        self.best, self.report = path / "control-best.safetensors", path / "report.html"

    def states(self) -> list[Path]:
        """Oldest first."""
        return numbered(self.path / "state", ".pt")

    def control_at(self, step: int) -> Path:
        return self.path / f"control-{step:06d}.safetensors"

    def grid(self, step: int) -> Path:
        return self.path / "samples" / f"{step:06d}.png"

    def grids(self) -> list[Path]:
        return numbered(self.path / "samples", ".png")

    @contextmanager
    def taken(self, resume: bool) -> Iterator[None]:
        """Nobody else writes to it within `with`. Raises ValueError if another process does, and as `check_new`."""
        with locked(self.path):
            if not resume:
                self.check_new()
            for folder in (self.path, self.path / "state", self.path / "samples"):
                remove_leftovers(folder)
            yield

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
            written = json.loads(self.settings_file.read_bytes())
            known = {"settings": dict(written["settings"]), "data": dict(written["data"])}
            return {**known, "launch": written.get("launch")}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.settings_file} is damaged ({error!r}): start another run, with --control "
                f"{self.control} to go on from what was learned"
            ) from error

    def was_begun_by(self, launch: str | None) -> bool:
        """Whether the run is that of the same call of torchrun, which has started its processes again."""
        with suppress(ValueError):
            return launch is not None and self.written()["launch"] == launch
        return False

    def check_fixed(self, given: dict, before: dict) -> None:
        """Raises ValueError if a command line gives another value for what a run started with and must keep."""
        for item in fields(TrainSettings):
            name = item.name
            if item.metadata["fixed"] and name in given and given[name] != before.get(name, given[name]):
                flag, had = flag_of(name), before[name]
                lacking = had is None or had is False or had == []
                how = f"without {flag}" if lacking else f"with {flag} {had}, not {given[name]}"
                raise ValueError(
                    f"the run in {self.path} was started {how}: leave it out, or start another run in another folder"
                )

    def begin(self, step: int, settings: TrainSettings, data: dict) -> None:
        """Writes settings.json, or finds the same `data` (a fingerprint) in that of the run that goes on at `step`."""
        before = self.written()["data"] if step else data
        if before != data:
            latents = "" if settings.no_cache else f", and --cache {settings.cache_folder} for its latents"
            raise ValueError(
                f"the run in {self.path} was started with other data or another base ({differences(before, data)}): "
                f"give the same as --data and --base, or start another run, with --control {self.control} to go on "
                f"from what was learned{latents}"
            )
        for folder in ("state", "samples"):
            (self.path / folder).mkdir(exist_ok=True)
        kept = {
            item.name: getattr(settings, item.name) for item in fields(settings) if not item.metadata.get("passing")
        }
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        written = {"settings": kept, "data": data, "versions": versions}
        if launch():
            written["launch"] = launch()
        write_text(self.settings_file, json.dumps(written, indent=2, default=str) + "\n")  # of paths their text
        self.cut_log(step)

    def log(self, values: dict) -> None:
        with open(self.log_file, "a") as file:
            file.write(json.dumps(values) + "\n")

    def cut_log(self, step: int) -> None:
        """Drops what was logged after `step`: a run that was killed will do these steps again."""
        if self.log_file.exists():
            lines = [json.dumps(values) + "\n" for values in self.logged() if values["step"] <= step]
            write_text(self.log_file, "".join(lines))

    def logged(self) -> Iterator[dict]:
        """The lines of the log; one that is still being written, or was put there by a user, is left out."""
        if self.log_file.exists():
            with open(self.log_file, errors="replace") as file:
                for line in file:
                    with suppress(ValueError, RecursionError):
                        values = json.loads(line)
                        if isinstance(values, dict) and type(values.get("step")) is int and "loss" in values:
                            yield values

    def save(self, state: dict, keep: int, best: bool) -> None:
        """The state after a step, and no more than the newest `keep`. Its ControlNet, which is written already, becomes
        the run's, and the best one if it is that; those without a state are removed."""
        written = self.control_at(state["step"])
        for path in (self.control, self.best) if best else (self.control,):
            new_link(path, written)
        # Last: a run that is killed before this resumes from the previous state.
        write_state(self.path / "state" / f"{state['step']:06d}.pt", state)
        for path in self.states()[:-keep]:
            path.unlink()
        kept = {self.control_at(int(path.stem)) for path in self.states()}
        for path in self.path.glob("control-*.safetensors"):
            if path.stem.removeprefix("control-").isdecimal() and path not in kept:
                path.unlink()

    def newest_state(self) -> tuple[Path, dict] | None:
        """The newest state that is whole, and its file: None in a run that was stopped before it had saved any. Damaged
        ones after it are renamed. Raises ValueError if none is whole."""
        damaged = []
        for path in reversed(self.states()):
            try:
                state = read_state(path)
            except DamagedState:
                damaged.append(path)
                continue
            for other in damaged:
                other.rename(other.with_suffix(".damaged"))
                note(f'"{other}" is damaged, its name ends in .damaged now: going on from step {state["step"]}')
            return path, state
        if damaged:
            raise ValueError(
                f"no state in {self.path} is whole, the newest is {damaged[0]}: start another run in another folder, "
                f"with --control {self.control} to go on from what was learned"
            )
        return None

    def reached(self) -> tuple[int, int]:
        """The steps done and the samples seen as of the newest state, of which no weights are read. Zeros if there is
        none or it is damaged."""
        for path in self.states()[-1:]:
            with suppress(Exception):  # as in `read_state`
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                return state["step"], state["position"]["seen"]
        return 0, 0

    def how_to_go_on(self) -> str:
        if self.states():
            return f"go on with --resume --out {self.path}"
        return "nothing is saved but cached latents, the same command starts again"


def numbered(folder: Path, suffix: str) -> list[Path]:
    """The files that are called by a step, in their order; those of any other name, a user's copies, are let alone."""
    found = (path for path in folder.glob(f"*{suffix}") if path.stem.isdecimal())
    return sorted(found, key=lambda path: int(path.stem))


@dataclass
class Position:
    """How many samples the run has looked at: the position in the data that comes next. And the lowest validation loss
    of all saves."""

    seen: int = 0
    best: float = math.inf

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.seen, self.best = state["seen"], state.get("best", math.inf)  # which older states lack

    def is_best(self, loss: float | None) -> bool:
        """Whether a save with this validation loss, if it has one, is the best so far."""
        if loss is None or not loss <= self.best:  # nor is NaN the best
            return False
        self.best = loss
        return True
