"""Where a run reports: what it says, and that it says it once."""

import math

import pytest
import torch

from controlnet.training.later import Later
from controlnet.training.options import TrainSettings
from controlnet.training.progress import Progress
from controlnet.training.run_state import Position, RunFolder

MEASURES = [0.0, 0.001, 0.02, 0.04, 0.2, 0.3]


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.grid(0).parent.mkdir()
    return folder


def report(run, steps):
    with Progress(run, TrainSettings(steps=6, out=run.path), min(steps) - 1) as progress:
        for step in steps:
            values = {"step": step, "lr": 0.1, "images_per_second": 2.0}
            values |= {"validation_loss": 1 / step, "control_measure": MEASURES[step - 1]}
            bad = step == 2
            progress.log(values, Later(torch.tensor(math.nan if bad else 0.5), torch.tensor(math.inf if bad else 1.0)))
        progress.flush()
        return progress


def test_a_validation_is_a_line_and_control_sets_in_once_also_in_a_resumed_run(run, capsys):
    report(run, [1, 2, 3])
    said, bar = capsys.readouterr()
    said = said.splitlines()
    assert "skipped=1" in bar and said[1].startswith("step 2: loss 0.5000")
    assert said[2] == "step 3: loss 0.5000, validation loss 0.3333, control measure +2.00%" and len(said) == 3
    with open(run.log_file, "a") as log:
        log.write('null\n{"step": "4", "loss": 1}\n{"step": 4}\nx\n')  # a user's
    report(run, [4])
    assert capsys.readouterr().out.splitlines()[1].startswith("control sets in at step 3:")
    progress = report(run, [5, 6])
    assert "sets in" not in capsys.readouterr().out and progress.convergence.set_in == 3
    assert "control set in at step 3" in run.report.read_text() and "step 6 of 6" in run.report.read_text()
    assert list(progress.curves["validation_loss"].steps) == [1, 2, 3, 4, 5, 6]
    logged = list(run.logged())
    assert logged[-1]["control_measure"] == 0.3 and [values["skipped"] for values in logged] == [0, 1, 0, 0, 0, 0]


def test_the_best_save_is_the_one_with_the_lowest_loss():
    position = Position()
    losses = {0.5: True, None: False, 0.6: False, math.nan: False, 0.4: True, 0.45: False}
    assert {loss: position.is_best(loss) for loss in losses} == losses
    resumed = Position()
    resumed.load_state_dict(position.state_dict())
    assert not resumed.is_best(0.41) and resumed.is_best(0.39)
    resumed.load_state_dict({"seen": 3})  # of a run from before there was a best
    assert resumed.is_best(9.0)
