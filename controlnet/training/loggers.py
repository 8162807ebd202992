"""Where a run is logged beside its own folder, with optional packages: numbers and grids of images, step by step."""

import importlib
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image

from .options import TrainSettings
from .run_state import RunFolder, write_text


def open_loggers(settings: TrainSettings, run: RunFolder) -> "list[TensorBoard | Tracker]":
    return [TensorBoard(run) if name == "tensorboard" else Tracker(name, settings, run) for name in settings.log]


class TensorBoard:
    def __init__(self, run: RunFolder):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run.path / "tensorboard")

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def show(self, grid: Path, step: int) -> None:
        self.writer.add_image("samples", np.asarray(Image.open(grid)), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """wandb, or trackio, which has its interface. A run that is resumed goes on there, too."""

    def __init__(self, package: str, settings: TrainSettings, run: RunFolder):
        self.package = importlib.import_module(package)
        id_file = run.path / "tracker-id"
        if not id_file.exists():
            write_text(id_file, f"{run.path.resolve().name}-{uuid4().hex[:8]}")
        name, config = id_file.read_text(encoding="utf-8"), {key: str(value) for key, value in asdict(settings).items()}
        # wandb knows a run by its id, trackio by its name.
        own = {"id": name, "dir": str(run.path)} if package == "wandb" else {}
        try:
            self.package.init(project="controlnet", name=name, config=config, resume="allow", **own)
        except Exception as error:  # each has its own, for a login that is missing or a server that does not answer
            raise ValueError(f"--log {package} cannot start ({error}): log in there first, or leave it out") from error

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.package.log(numbers, step=step)

    def show(self, grid: Path, step: int) -> None:
        self.package.log({"samples": self.package.Image(str(grid))}, step=step)

    def close(self) -> None:
        self.package.finish()
