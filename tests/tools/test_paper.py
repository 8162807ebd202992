"""The paper in miniature: one experiment at toy size, the page that is drawn of its numbers, and what these say."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small import SMALLEST, small_sd

import train
from tools.page.charts import chart
from tools.paper import __main__ as paper
from tools.paper import architectures, composition, convergence, cost, data_size, guidance, lab, runs, transfer
from tools.paper.page import EXPERIMENTS, anchor
from tools.paper.statistics import LEARNED, above, judged, shown

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
    seeds = [argv[argv.index("--seed") + 1] for argv in measure("guidance")]
    assert seeds == ["0", "1"]
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
    assert f"(#{anchor(EXPERIMENTS['guidance'].title)})" in page


def test_trainings_are_shared_and_others_are_added(toy):
    """Both need the training of one seed, one another on shapes; nothing is left of what trainings go on from."""
    measure, out = toy
    measure("transfer", "--seeds", "1")
    (begun,) = measure("composition", "--seeds", "1")
    assert begun[begun.index("--data") + 1] == "shapes"
    folders = [path for path in (out / "runs").iterdir() if (path / "settings.json").exists()]
    assert len(folders) >= 2 and not any((folder / "state").exists() for folder in folders)
    assert set(json.loads((out / "composition.json").read_text())["numbers"]["controls"]) == {
        composition.OUTLINE,
        composition.EDGES,
        composition.AGREEING,
        composition.DISAGREEING,
    }


def test_numbers_of_other_options_are_measured_again(toy):
    measure, out = toy
    measure("guidance")
    file = json.loads((out / "guidance.json").read_text())
    (out / "guidance.json").write_text(json.dumps({**file, "settings": {**file["settings"], "steps": 7}}))
    measure("guidance")
    assert json.loads((out / "guidance.json").read_text())["settings"]["steps"] == 2


def test_a_training_that_fails_or_is_stopped_ends_the_work(toy, tmp_path, monkeypatch, capsys):
    _, out = toy
    arguments = ["guidance", "--base", str(out.parent / "base.safetensors"), "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(runs, "launch", lambda argv: 2)
    assert paper.main(arguments) == 2
    assert "train.py ended with status 2" in capsys.readouterr().err

    def stopped(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "launch", stopped)
    assert paper.main(arguments) == 130
    assert not list(tmp_path.glob("*.json"))


def test_a_run_that_was_stopped_goes_on(tmp_path):
    run = runs.Run(tmp_path, {"steps": 3, "no_cache": True})
    assert runs.arguments(run, None, "cpu")[:3] == ["--steps", "3", "--no-cache"]
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "000002.pt").touch()
    again = runs.arguments(run, None, "cpu")
    assert again[0] == "--resume" and "--steps" not in again


def test_every_experiment_is_in_the_help():
    assert tuple(EXPERIMENTS) == paper.NAMES


# ----------------------------------------------------------------------------------------------- what the numbers say


def test_means_deviations_and_what_is_above():
    assert shown([0.5]) == "0.50" and shown([0.4, 0.6]) == "0.50 ± 0.14"
    assert above([0.9, 0.92], [0.8, 0.82]) and not above([0.9, 0.7], [0.8, 0.6])
    assert above([0.9], [0.87]) and not above([0.9], [0.89])
    assert judged([LEARNED - 0.1], True, "").agrees is None and judged([LEARNED + 0.1], False, "").agrees is False


@pytest.mark.parametrize("lite, agrees", [([0.3, 0.31], True), ([0.9, 0.91], False)])
def test_the_ablation_study_agrees_if_both_baselines_fail(lite, agrees):
    fidelity = {
        f"{name}, {kind}": {"iou": values}
        for name, values in {"full": [0.9, 0.91], "lite": lite, "gaussian": [0.5, 0.51]}.items()
        for kind in architectures.PROMPTS
    }
    assert architectures.verdict({"fidelity": fidelity}).agrees is agrees


@pytest.mark.parametrize(
    "values, width, agrees",
    [([0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9], 10, True), ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 50, False)],
)
def test_convergence_is_sudden_if_the_middle_of_the_way_is_short(values, width, agrees):
    points = [(10 * (i + 1), value) for i, value in enumerate(values)]
    start, end = convergence.jump(points)
    assert end - start == width
    curves = {"iou": points, "validation_loss": [(step, 2 - step / 80) for step, _ in points]}
    assert convergence.verdict({"steps": 80, "watched": [curves]}).agrees is agrees
    assert convergence.fall(curves)[1] == pytest.approx(1 - 1 / 1.875)


def test_a_data_set_collapses_and_grows():
    sizes = {"100": {"iou": [0.5]}, data_size.FEW: {"iou": [0.8]}, data_size.ENDLESS: {"iou": [0.9]}}
    assert data_size.verdict({"sizes": sizes}).agrees is True
    assert "it grows" in data_size.verdict({"sizes": sizes}).why
    sizes[data_size.FEW]["iou"] = [0.3]
    assert data_size.verdict({"sizes": sizes}).agrees is False


@pytest.mark.parametrize("weighted, agrees", [([0.2, 0.21], True), ([0.4, 0.41], False)])
def test_guidance_agrees_if_it_is_removed_strengthened_and_tamed(weighted, agrees):
    contrasts = dict.fromkeys(guidance.WAYS, [0.2, 0.201])
    contrasts |= {guidance.ALONE: [0.4, 0.41], guidance.WEIGHTED: weighted}
    ways = {name: {"iou": [0.9, 0.9], "contrast": values} for name, values in contrasts.items()}
    assert guidance.verdict({"ways": ways}).agrees is agrees


def test_composition_and_transfer_agree_unless_fidelity_is_lost():
    outlines = {composition.OUTLINE: [0.9], composition.EDGES: [0.8], composition.AGREEING: [0.9]}
    for both, agrees in (([0.9], True), ([0.7], False)):
        controls = {name: {"outline": values} for name, values in {**outlines, composition.AGREEING: both}.items()}
        assert composition.verdict({"controls": controls}).agrees is agrees
    for untouched, agrees in (([0.85], True), ([0.6], False)):
        bases = {transfer.OWN: [0.9], transfer.UNTOUCHED: untouched, transfer.MOVED: [0.9]}
        assert transfer.verdict({"bases": {name: {"iou": v} for name, v in bases.items()}}).agrees is agrees


def test_what_a_disagreeing_pair_is_measured_by():
    left, right = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    left[2:6, 1:4], right[2:6, 4:7] = True, True
    image = np.where((left | right)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    assert composition.followed([image], [left], [right]) == {"outline": 0.5, "edges": 0.5, "either": 1.0}


# ------------------------------------------------------------------------------------------------------ what is counted


def test_the_cost_of_a_step_is_that_of_what_gets_gradients():
    control, decoder, encoder = (cost.counted(SMALLEST, 1, step) for step in cost.STEPS[1:])
    assert control.trained == decoder.trained == encoder.trained
    assert control.memory < decoder.memory < encoder.memory
    assert control.operations < decoder.operations < encoder.operations
    frozen = cost.counted(SMALLEST, 1, architecture="frozen")
    assert frozen.trained < control.trained and frozen.memory < control.memory
    assert frozen.operations < control.operations


def test_convergence_is_read_from_the_logs_of_trainings(monkeypatch):
    """Whose control sets in at step 20, at the rate 3e-3 at step 10."""

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
        scale=replace(TOY, steps=40),
        circles=[],
        train=lambda seed, **given: SimpleNamespace(log=lambda: log(10 if given.get("lr") == 3e-3 else 20)),
        load=lambda run: None,
        draw_circles=lambda net: [],
    )
    monkeypatch.setattr(convergence, "circles_measured", lambda images, circles: {"iou": 0.9})
    numbers = json.loads(json.dumps(convergence.measure(stub)))
    assert [one["set_in"] for one in numbers["kinds"]["default"]] == [20, 20]
    assert [one["set_in"] for one in numbers["kinds"]["learning rate 3e-3"]] == [10]
    assert numbers["zero_convs"][0][0] == [10, 2.0]
    seeds, kinds = convergence.tables(numbers)
    assert "| seed 1 | 10 to 20 | 16.7% | 16.7% |" in seeds and "| learning rate 3e-3 | 10 | 0.90 |" in kinds
    assert convergence.verdict(numbers).agrees is True
    drawn = convergence.charts(numbers)
    assert drawn["IoU"]["seed 0"][1] == [20, 0.9] and len(drawn["control measure"]) == 1 + len(convergence.VARIANTS)
    assert all("<polyline" in chart(title, curves) for title, curves in drawn.items())
