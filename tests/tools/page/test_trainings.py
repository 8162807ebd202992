"""How the page reads runs, and starts and stops them, without a page."""

import json
import os
import time
from pathlib import Path

import pytest

from tools.page import trainings as module
from tools.page.trainings import Trainings, log_of, shown

# In place of train.py: it says how it was called, holds the run's lock and ends as that does.
TRAINING = """
import signal, sys, time
from pathlib import Path
from controlnet.training.lock import locked
out = Path(next(argument for argument in sys.argv if argument.startswith("--out=")).removeprefix("--out="))
signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved after step 7"))
with locked(out):
    print("latents: 0%\\rlatents: 100%", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAINING)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    (tmp_path / "runs").mkdir()
    return Trainings(tmp_path / "runs")


def write_run(folder, lines, steps=10):
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"settings": {"steps": steps}, "data": {}}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def wait_for(condition):
    end = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_a_run_is_read_while_it_is_written(trainings):
    write_run(trainings.folder / "one", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "zero_convs": [0.5, 0.25]}])
    run = trainings.run("one")
    with open(run.log_file, "a") as file:
        file.write('{"step": 3, "lo')  # it is being written
    assert [line["step"] for line in log_of(run)] == [1, 2]
    write_run(trainings.folder / ".hidden", [])
    assert trainings.names() == ["one"] and trainings.status("one") == "ended after step 2 of 10"
    with open(run.log_file, "a") as file:
        file.write('ss": NaN}\n')
    assert [line["step"] for line in log_of(run)] == [1, 2, 3]


def test_grids_are_in_order(trainings):
    write_run(trainings.folder / "one", [])
    (trainings.folder / "one" / "samples").mkdir()
    for name in ("000050.png", "1000000.png", "000100.png", "mine.png"):
        (trainings.folder / "one" / "samples" / name).touch()
    assert [int(path.stem) for path in trainings.run("one").grids()] == [50, 100, 1000000]


@pytest.mark.parametrize("name", [None, "", "..", "../other", "/tmp", ".hidden", "-rf", "a/b"])
def test_no_run_is_outside_the_folder(trainings, name):
    for act in (trainings.run, trainings.status, trainings.stop, trainings.output, lambda n: trainings.start(n, {})):
        with pytest.raises(ValueError, match="cannot name a run" if name else "no run is named"):
            act(name)


def test_the_command_is_that_of_train_py(trainings):
    given = {"data": "fill50k", "batch_size": "2", "lr": "", "checkpointing": True, "resume": False, "steps": "--out=/"}
    typed = shown(trainings.arguments("my run", given))
    begun = "python train.py --data=fill50k --batch-size=2 --checkpointing --steps=--out=/ "
    assert typed == f"{begun}'--out={trainings.folder}/my run'"


def test_a_training_is_started_and_stopped(trainings):
    trainings.start("one", {"data": "fill50k"})
    with pytest.raises(ValueError, match='"one" is being trained'):  # although it holds no lock yet
        trainings.start("one", {})
    wait_for(lambda: trainings.output("one").endswith("latents: 100%"))
    assert trainings.status("one").startswith("preparing its data; process ")
    process = int(trainings.status("one").split()[-1])
    assert os.getsid(process) == process != os.getsid(0)  # what ends the page does not end it
    with pytest.raises(ValueError, match='"one" is being trained'):
        trainings.start("one", {})
    write_run(trainings.folder / "one", [{"step": 1, "loss": 2.0}])
    assert trainings.status("one") == f"step 1 of 10; process {process}"
    write_run(trainings.folder / "one", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert "step 2 of 10, about 0.0 minutes left" in trainings.status("one")
    trainings.stop("one")
    wait_for(lambda: "ended after step 2" in trainings.status("one"))
    assert trainings.output("one").splitlines()[0] == shown(trainings.arguments("one", {"data": "fill50k"}))
    assert trainings.output("one").endswith("saved after step 7")
    with pytest.raises(ValueError, match='no process of this machine trains "one"'):
        trainings.stop("one")
