"""Optional packages that a run is logged with: none of them is needed here, stand-ins note what they are told."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from controlnet.training.later import Later
from controlnet.training.loggers import open_loggers
from controlnet.training.options import TrainSettings
from controlnet.training.progress import Progress
from controlnet.training.run_state import RunFolder

VALUES = {"step": 5, "lr": 0.1, "images_per_second": 2.0, "memory_gb": 1.0, "zero_convs": [1.0, 2.0]}


@pytest.fixture
def run(tmp_path):
    """With a grid of step 5."""
    folder = RunFolder(tmp_path / "my run")
    folder.grid(5).parent.mkdir(parents=True)
    Image.fromarray(np.full((2, 4, 3), 7, np.uint8)).save(folder.grid(5))
    return folder


@pytest.fixture
def told(monkeypatch):
    """What wandb, trackio and TensorBoard's writer are told, in order."""
    calls = []

    def noting(name):
        return lambda *given, **named: calls.append((name, given, named)) or SimpleNamespace()

    for package in ("wandb", "trackio"):
        module = ModuleType(package)
        module.init, module.log, module.finish = (noting(f"{package}.{name}") for name in ("init", "log", "finish"))
        module.Image = lambda file: ("image", file)
        monkeypatch.setitem(sys.modules, package, module)

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(("open", (folder,), {}))

        def __getattr__(self, name):
            return noting(name)

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return calls


def report(run, name, number):
    settings = TrainSettings(log=[name], steps=5, out=run.path)
    with Progress(run, settings, 4) as progress:
        progress.log({**VALUES, "grid": "000005.png"}, Later(torch.tensor(number), torch.tensor(1.0)))
        progress.flush()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_numbers_and_grids_and_the_same_run_when_it_goes_on(run, told, name):
    report(run, name, 0.5)
    (opened, given, named), (log, (numbers,), step), (_, (grid,), grid_step), (closed, *_) = told
    assert (opened, log, closed) == (f"{name}.init", f"{name}.log", f"{name}.finish")
    assert named["name"].startswith("my run-") and named["resume"] == "allow" and named["config"]["steps"] == "5"
    assert (named.get("id") == named["name"]) == (name == "wandb")
    assert numbers["loss"] == 0.5 and numbers["zero_convs/1"] == 2 and step == grid_step == {"step": 5}
    assert "grid" not in numbers and grid == {"samples": ("image", str(run.grid(5)))}
    report(run, name, 0.5)
    assert told[4][2]["name"] == named["name"]


def test_tensorboard_gets_numbers_and_grids(run, told):
    report(run, "tensorboard", 0.5)
    assert told[0] == ("open", (run.path / "tensorboard",), {})
    assert ("add_scalar", ("loss", 0.5, 5), {}) in told and ("add_scalar", ("zero_convs/0", 1.0, 5), {}) in told
    ((_, (tag, pixels, step), named),) = [call for call in told if call[0] == "add_image"]
    assert (tag, step, named, pixels.shape) == ("samples", 5, {"dataformats": "HWC"}, (2, 4, 3)) and pixels[
        0, 0, 0
    ] == 7
    assert told[-1][0] == "close"


def test_a_tracker_that_cannot_start_is_one_sentence(run, told, monkeypatch):
    def fail(**_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(ValueError, match="--log wandb cannot start .api_key not configured.: log in"):
        open_loggers(TrainSettings(log=["wandb"]), run)
