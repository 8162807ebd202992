"""The paper in miniature: experiments at toy size, the page that is drawn of their numbers, and what is counted."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALLEST, small_sd

import train
from controlnet.common.images import save_png
from controlnet.training.charts import chart
from controlnet.training.memory import optimizer_size
from controlnet.training.run_state import RunFolder
from tools.paper import __main__ as paper
from tools.paper import architectures, composition, convergence, cost, guidance, lab, runs, segmentation
from tools.paper.page import EXPERIMENTS, anchor

counted = cache(cost.counted)
ONE_LEVEL = replace(SMALLEST, unet=replace(SMALLEST.unet, multipliers=(1,), attention=(True,), heads=(2,)))
TOY = lab.Scale(seeds=2, steps=2, images=8, samples=2, sampling_steps=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """measure(NAME ...): runs them at toy size, train.py in this process -> the trainings that were begun."""
    folder, begun = tmp_path_factory.mktemp("paper"), []
    small_sd(SMALLEST).save(folder / "base.safetensors")
    options = ["--base", str(folder / "base.safetensors"), "--out", str(folder / "page"), "--device", "cpu", "--quick"]

    def launch(argv):
        begun.append(argv)
        return train.main(argv)

    def measure(*names):
        begun.clear()
        assert paper.main([*names, *options]) == 0
        return begun

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lab, "QUICK", TOY)
        for name, few in {"BATCH": 2, "WATCHED": 1, "VALIDATION": 2}.items():
            patched.setattr(lab, name, few)
        patched.setattr(runs, "launch", launch)
        yield measure, folder / "page"


def test_an_experiment_is_trained_once_and_drawn_from_its_numbers(toy, monkeypatch):
    measure, out = toy
    begun = measure("guidance")
    assert [argv[argv.index("--seed") + 1] for argv in begun] == ["0", "1"]
    assert begun[0][begun[0].index("--warmup") + 1] == "50", "however many steps there are"
    file = json.loads((out / "guidance.json").read_text())
    assert all(len(row["iou"]) == 2 for row in file["numbers"]["ways"].values())
    with Image.open(out / "guidance.jpg") as sheet:
        assert sheet.height == 80 * (1 + len(guidance.WAYS))

    file["numbers"]["ways"][guidance.WITHOUT]["iou"] = [0.25, 0.75]
    (out / "guidance.json").write_text(json.dumps(file))
    monkeypatch.setitem(EXPERIMENTS, "guidance", replace(EXPERIMENTS["guidance"], measure=None))
    assert measure("guidance") == []
    page = (out / "README.md").read_text()
    assert f"| {guidance.WITHOUT} | 0.50 ± 0.35 |" in page and "![The first six samples](guidance.jpg)" in page
    assert f"(#{anchor(EXPERIMENTS['guidance'].title)}) | 2 | 2 | " in page
    assert "Muon at a constant rate of 0.001" in page


def test_trainings_are_shared_and_others_are_added(toy):
    """Both need the training of one seed, one another on shapes; nothing is left of what trainings go on from."""
    measure, out = toy
    measure("transfer", "--seeds", "1")
    (begun,) = measure("composition", "--seeds", "1")
    assert begun[begun.index("--data") + 1] == "shapes"
    folders = [path for path in (out / "runs").iterdir() if (path / "settings.json").exists()]
    assert len(folders) >= 2 and not any((folder / "state").exists() for folder in folders)
    assert composition.verdict(json.loads((out / "composition.json").read_text())["numbers"]).agrees is None


def test_numbers_of_other_options_are_measured_again(toy, monkeypatch):
    measure, out = toy
    measure("guidance")
    file = json.loads((out / "guidance.json").read_text())
    again = {**file["numbers"], "true": 0.25}
    monkeypatch.setitem(EXPERIMENTS, "guidance", replace(EXPERIMENTS["guidance"], measure=lambda lab: again))
    measure("guidance")
    assert json.loads((out / "guidance.json").read_text()) == file
    (out / "guidance.json").write_text(json.dumps({**file, "settings": {**file["settings"], "steps": 7}}))
    measure("guidance")
    assert json.loads((out / "guidance.json").read_text()) == {**file, "numbers": again}


def test_a_training_that_fails_or_is_stopped_ends_the_work(toy, tmp_path, monkeypatch, capsys):
    _, out = toy
    arguments = ["guidance", "--base", str(out.parent / "base.safetensors"), "--quick", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "launch", lambda argv: 2)
    assert paper.main(arguments) == 2
    assert "train.py ended with status 2" in capsys.readouterr().err

    def stopped(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "launch", stopped)
    assert paper.main(arguments) == 130
    assert (tmp_path / "runs" / "paper-quick").exists() and not list(tmp_path.rglob("*.json"))


def test_a_run_that_was_stopped_goes_on(tmp_path):
    run = runs.Run(tmp_path, {"steps": 3, "no_cache": True})
    assert runs.arguments(run, None, "cpu")[:3] == ["--steps", "3", "--no-cache"]
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "000002.pt").touch()
    again = runs.arguments(run, None, "cpu")
    assert again[0] == "--resume" and "--steps" not in again


# ----------------------------------------------------------------------------------------------------- what is measured


def test_the_next_pictures_disc_is_the_floor():
    left, right = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    left[2:6, 1:4], right[2:6, 4:7] = True, True
    images = [np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2) for mask in (left | right, right)]
    assert composition.followed(images, [left, right]) == {"own": 0.75, "next": 0.25, "either": 0.75}


def test_two_halves_are_the_hint():
    hint = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1)
    (left,), (right,) = composition.halves([hint], left=True), composition.halves([hint], left=False)
    assert (left + right == hint).all() and not left[:, 2:].any() and left[:, :2].all()


def test_numbers_of_another_judge_are_others(tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "JUDGE", tmp_path / "judge.safetensors")
    found = [segmentation.which_judge(None)]
    for content in (b"one", b"two"):
        segmentation.JUDGE.write_bytes(content)
        found.append(segmentation.which_judge(None))
    assert found[0] == {"judge": "trained here"} and found[1] != found[2]


# ------------------------------------------------------------------------------------------------------ what is counted


def test_the_cost_of_a_step_is_that_of_what_gets_gradients():
    control, decoder, encoder = (counted(ONE_LEVEL, 1, step) for step in cost.STEPS[1:])
    assert control.trained == decoder.trained == encoder.trained
    assert control.memory < decoder.memory < encoder.memory
    assert control.operations < decoder.operations < encoder.operations
    frozen = counted(ONE_LEVEL, 1, cost.CONTROL, "frozen")
    assert frozen.trained < control.trained and frozen.memory < control.memory
    assert frozen.operations < control.operations


def test_muon_keeps_one_moment_of_weights_between_layers():
    part = torch.nn.ModuleDict({"middle": torch.nn.Linear(3, 2)})
    assert optimizer_size(part, "adamw") == 4 * 2 * (6 + 2)
    assert optimizer_size(part, "muon") == 4 * (6 + 2 * 2)


def test_a_timed_step_moves_what_is_trained(monkeypatch):
    """The base in the first row, nothing of it in the others, whatever gets gradients there."""
    monkeypatch.setattr(cost, "BATCH", 1)
    monkeypatch.setattr(cost, "copy", SimpleNamespace(deepcopy=lambda sd: sd))
    before = small_sd(SMALLEST)
    for name in (cost.BASE, cost.ENCODER):
        sd = small_sd(SMALLEST)
        cost.step_of(SimpleNamespace(device=torch.device("cpu"), sd=sd), name)()
        pairs = zip(sd.unet.parameters(), before.unet.parameters(), strict=True)
        assert any(not torch.equal(moved, was) for moved, was in pairs) == (name == cost.BASE)


@pytest.mark.parametrize("architecture", ["lite", "concat", "frozen"])
def test_the_architectures_are_timed_as_they_are_trained(monkeypatch, architecture):
    monkeypatch.setattr(cost, "BATCH", 1)
    trained = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda given, **_: trained.extend(given) or SimpleNamespace(step=int))
    sd = small_sd(ONE_LEVEL)
    cost.step_of(SimpleNamespace(device=torch.device("cpu"), sd=sd), cost.CONTROL, architecture)()
    count = sum(parameter.numel() for parameter in trained)
    expected = counted(ONE_LEVEL, 1, cost.CONTROL, architecture).trained
    assert count == expected != counted(ONE_LEVEL, 1, cost.CONTROL).trained
    assert all(parameter.grad is not None for parameter in trained)


def test_what_the_trainings_logs_tell_is_shown_beside_the_ious():
    def log(last):
        values = [(10, 0.6, 0.0), (20, 0.5, 0.2), (30, last, 0.3)]
        return [dict(zip(("step", "validation_loss", "control_measure"), one, strict=True)) for one in values]

    stub = SimpleNamespace(scale=TOY, train=lambda seed, **_: SimpleNamespace(log=lambda: log(0.25 + seed / 4)))
    found = architectures.trainings_of(stub, "lite")
    assert found == {"set_in": [20, 20], "validation_loss": [0.25, 0.5]}
    cost = dict.fromkeys(("trained", "memory", "operations", "seconds"), 1.0)
    fidelity = {"lite, perfect": {"iou": [0.5, 0.5], "colours": [1.0, 1.0]}}
    numbers = {"kinds": ["perfect"], "fidelity": fidelity, "trainings": {"lite": found}, "costs": {"lite": cost}}
    numbers["device"] = "a processor, 2 threads"
    assert "| ms in fp32 on a processor, 2 threads |" in architectures.tables(numbers)[3]
    assert "| lite | 20, 20 | 0.3750 ± 0.1768 |" in architectures.tables(numbers)[2]


def test_convergence_is_read_from_the_logs_and_the_grids_of_trainings(monkeypatch, tmp_path):
    """Whose control sets in at step 20, at the rate 3e-3 at step 10."""
    for step in (9, 10, 20):  # hint, sample, truth, words: samples are as red as there are steps
        columns = (0, 10 * step, 255, 255)
        save_png(
            Image.fromarray(np.hstack([np.full((8, 8, 3), v, np.uint8) for v in columns])),
            tmp_path / f"samples/{step:06}.png",
            {},
        )

    def log(sets_in):
        return [
            {
                "step": step,
                "loss": 0.1,
                "iou": 0.9 if step >= sets_in else 0.1,
                "validation_loss": 0.5 if step >= sets_in else 0.6,
                "control_measure": 0.2 if step >= sets_in else 0.0,
                "zero_convs": [1.0, 3.0],
            }
            for step in (10, 20, 30, 40)
        ]

    stub = SimpleNamespace(
        out=tmp_path,
        scale=replace(TOY, steps=40),
        circles=[],
        train=lambda seed, **given: SimpleNamespace(
            log=lambda: log(10 if given.get("lr") == 3e-3 else 20), folder=RunFolder(tmp_path)
        ),
        load=lambda run: None,
        draw_circles=lambda net: [],
    )
    monkeypatch.setattr(convergence, "circles_measured", lambda images, circles: {"iou": 0.9})
    monkeypatch.setattr(convergence, "untrained", lambda lab: 0.1)
    numbers = json.loads(json.dumps(convergence.measure(stub)))
    with Image.open(tmp_path / "convergence.jpg") as sheet:  # hints, then every other grid
        assert sheet.height == 3 * 80
        assert [sheet.getpixel((150, y))[0] for y in (40, 120, 200)] == pytest.approx([0, 90, 200], abs=3)
    assert [one["set_in"] for one in numbers["kinds"]["default"]] == [20, 20]
    assert [one["set_in"] for one in numbers["kinds"]["learning rate 3e-3"]] == [10]
    assert numbers["zero_convs"][0][0] == [10, 2.0]
    seeds, kinds = convergence.tables(numbers)
    assert "| seed 1 | 10 to 20 | 16.7% | 16.7% |" in seeds and "| learning rate 3e-3 | 10 | 0.90 |" in kinds
    drawn = convergence.charts(numbers)
    assert drawn["IoU"]["seed 0"][:3:2] == [[0, 0.1], [20, 0.9]] and len(drawn["control measure"]) == 1 + len(
        convergence.VARIANTS
    )
    assert all("<polyline" in chart(title, curves) for title, curves in drawn.items())
