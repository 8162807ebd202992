"""What tools.paper says of numbers, on numbers that are made up: each rule with the case that it must not pass."""

from math import exp
from types import SimpleNamespace

import pytest

from controlnet.worlds.fill50k import draw_circle
from tools.paper import (
    architectures,
    composition,
    convergence,
    copies,
    cost,
    data_size,
    guidance,
    segmentation,
    transfer,
)
from tools.paper.statistics import LEARNED, above, all_of, judged, shown

HIGH, MIDDLE, LOW = [0.9, 0.91, 0.92], [0.5, 0.51, 0.52], [0.2, 0.21, 0.22]
VAGUE = [0.5, 0.9, 1.0]  # cannot be told from HIGH


def test_means_deviations_and_what_is_above():
    assert shown([0.5]) == "0.50" and shown([0.4, 0.6]) == "0.50 ± 0.14"
    assert above(HIGH, LOW) is True and above(LOW, HIGH) is False
    assert above(HIGH, VAGUE) is None and above(HIGH, HIGH) is False
    assert above([0.9, 0.91], [0.885, 0.895]) is None, "a little: neither more than the least nor less"
    assert above([0.9], [0.1]) is None, "of one training each"
    assert above([0.99], HIGH) is True, "of no training"


def test_an_answer_of_answers():
    assert all_of(True, True) is True
    assert all_of(True, None) is None
    assert all_of(None, False, True) is False


def test_what_has_not_learned_or_was_trained_once_says_nothing():
    assert judged([LEARNED - 0.1] * 2, True, "").agrees is None
    assert judged([LEARNED + 0.1], True, "").agrees is None
    assert judged([LEARNED + 0.1] * 2, False, "").agrees is False


# -------------------------------------------------------------------------------------------------- sudden convergence


def curve(value, steps, every=20):
    return [[step, value(step)] for step in range(0, steps + 1, every)]


def jumps_at(onset):
    return lambda step: 0.1 + 0.8 * (step > onset)


@pytest.mark.parametrize("steps", [300, 3000])
@pytest.mark.parametrize(
    "value, agrees",
    [
        (jumps_at(100), True),
        (lambda step: min(step / 300, 1), False),
        (lambda step: 1 - exp(-step / 40), False),
        (jumps_at(10), None),  # between the first two measurements: it may have come in any way
    ],
    ids=["jump", "line", "exponential", "too early"],
)
def test_convergence_is_judged_by_its_onset_not_by_the_length_of_the_run(steps, value, agrees):
    assert convergence.verdict({"iou": [curve(value, steps)] * 3}).agrees is agrees


def test_where_a_jump_lies_and_what_the_loss_shows_of_it():
    iou, loss = curve(jumps_at(45), 80, every=10), curve(lambda step: 2 - step / 80, 80, every=10)
    assert convergence.jump(iou) == (40, 50)
    assert convergence.shares(iou) == (0.0, pytest.approx(0.2))
    assert convergence.fall(iou, loss[1:]) == (pytest.approx(1 - 1.375 / 1.5), pytest.approx(1 - 1 / 1.875))
    assert convergence.jump(curve(lambda step: 0.5 - step / 800, 80)) == (60, 80), "it only falls"


# -------------------------------------------------------------------------------------------------------- the ablations


def ablations(full=HIGH, lite=LOW, gaussian=LOW, **more):
    return {
        f"{name}, {kind}": {"iou": values}
        for name, values in {"full": full, "lite": lite, "gaussian": gaussian, **more}.items()
        for kind in architectures.PROMPTS
    }


@pytest.mark.parametrize(
    "fidelity, agrees",
    [
        (ablations(), True),
        (ablations(lite=HIGH), False),
        (ablations(gaussian=VAGUE), None),
        (ablations(lite=LOW, gaussian=[0.8, 0.81, 0.82]), False),  # below the full one, but not about as lite
        (ablations() | {"full, conflicting": {"iou": LOW}}, False),
        (ablations(full=LOW), None),
    ],
    ids=["both fail", "lite does not", "gaussian varies", "gaussian is better than lite", "full fails", "too early"],
)
def test_the_ablation_study(fidelity, agrees):
    assert architectures.verdict({"fidelity": fidelity}).agrees is agrees


@pytest.mark.parametrize("frozen, agrees", [(MIDDLE, True), (VAGUE, None), ([0.97, 0.98, 0.99], False)])
def test_copies_agree_if_each_change_of_the_copy_is_a_loss(frozen, agrees):
    fidelity = ablations(random=LOW, frozen=frozen, concat=LOW)
    assert copies.verdict({"fidelity": fidelity}).agrees is agrees


# ----------------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("few, agrees", [(MIDDLE, True), (LOW, False), (VAGUE, None), ([0.97, 0.98, 0.99], False)])
def test_more_pictures_are_better_and_few_no_collapse(few, agrees):
    sizes = {data_size.FEW: {"iou": few}, data_size.ENDLESS: {"iou": HIGH}}
    assert data_size.verdict({"sizes": sizes}).agrees is agrees


MILD, STRONG = [0.2, 0.205, 0.21], [0.4, 0.405, 0.41]  # contrasts


@pytest.mark.parametrize(
    "way, contrast, iou, agrees, said",
    [
        (guidance.LITERAL, MILD, HIGH, True, "as it is written is a remedy"),
        (guidance.LITERAL, [0.2, 0.4, 0.5], HIGH, None, "as it is written may be a remedy"),
        (guidance.LITERAL, STRONG, HIGH, False, "as it is written is not a remedy"),
        (guidance.LITERAL, MILD, LOW, False, "as it is written is not a remedy"),  # as weights of zero would be
        (guidance.WEIGHTED, MILD, LOW, True, "the largest weight it is not one"),  # which is not the paper's
        (guidance.ALONE, MILD, HIGH, False, "guidance is not stronger"),
    ],
)
def test_guidance_is_cured_if_it_gets_milder_and_hints_are_followed(way, contrast, iou, agrees, said):
    ways = {name: {"iou": HIGH, "contrast": MILD} for name in guidance.WAYS}
    ways[guidance.ALONE] = {"iou": HIGH, "contrast": STRONG}
    ways[way] = {"iou": iou, "contrast": contrast}
    verdict = guidance.verdict({"ways": ways})
    assert verdict.agrees is agrees and said in verdict.why


@pytest.mark.parametrize(
    "changed, agrees",
    [
        ({}, True),
        ({composition.HALVES: MIDDLE}, False),  # no better than the left half alone: the other net does nothing
        ({composition.LEFT: VAGUE}, None),
        ({composition.AGREEING: MIDDLE}, False),
        ({composition.EDGES: LOW}, None),
    ],
)
def test_controls_compose_if_each_adds_to_the_other(changed, agrees):
    found = dict.fromkeys((composition.OUTLINE, composition.EDGES, composition.AGREEING, composition.HALVES), HIGH)
    found |= {composition.LEFT: MIDDLE, composition.RIGHT: LOW, **changed}
    assert composition.verdict({"controls": {name: {"own": v} for name, v in found.items()}}).agrees is agrees


@pytest.mark.parametrize(
    "iou, own, pastel, agrees",
    [
        (HIGH, LOW, HIGH, True),
        (MIDDLE, LOW, HIGH, False),
        (HIGH, [0.0, 0.01, 0.02], LOW, None),  # more than by its own base, but few
        (HIGH, HIGH, VAGUE, None),  # they are in pastel by its own base, too
    ],
)
def test_transfer_is_judged_once_the_other_base_has_its_own_style(iou, own, pastel, agrees):
    bases = {
        transfer.OWN: {"iou": HIGH, "pastel": own},
        transfer.UNTOUCHED: {"iou": iou, "pastel": pastel},
    }
    assert transfer.verdict({"bases": bases}).agrees is agrees


@pytest.mark.parametrize(
    "full, lite, real, agrees",
    [
        (MIDDLE, [0.3, 0.31, 0.32], 0.9, True),
        (MIDDLE, [0.7, 0.71, 0.72], 0.9, False),
        (MIDDLE, [0.3, 0.31, 0.32], 0.5, False),
        (MIDDLE, [0.3, 0.5, 0.6], 0.9, None),
        (LOW, [0.1, 0.11, 0.12], 0.9, None),  # full lies below pictures of other maps
        ([0.5], [0.3], 0.9, None),
    ],
)
def test_segmentation_is_judged_once_maps_are_followed(full, lite, real, agrees):
    fidelity = {"full": full, "lite": lite, segmentation.REAL: [real], segmentation.FLOOR: [0.25]}
    assert segmentation.verdict({"fidelity": {name: {"iou": v} for name, v in fidelity.items()}}).agrees is agrees


@pytest.mark.parametrize("memory, agrees", [(1.2, True), (0.9, False), (1.6, False)])
def test_cost_is_judged_by_memory_alone(memory, agrees):
    steps = {name: {"memory": 1.0, "operations": 1} for name in cost.STEPS}
    steps[cost.CONTROL] = {"memory": memory, "operations": 1000}
    assert cost.verdict({"costs": {cost.AUTHORS: steps}}).agrees is agrees


def test_a_style_is_told_apart_wherever_the_disc_is():
    circles = [draw_circle(64, 32, 32, 12, "red", "blue")]
    moved = draw_circle(64, 20, 40, 12, "red", "blue").image
    lab = SimpleNamespace(circles=circles)
    assert transfer.measured([moved], lab)["pastel"] == 0
    found = transfer.measured([transfer.pastel(moved)], lab)
    assert found["pastel"] == 1 and found["iou"] < 0.5
    assert transfer.measured([transfer.pastel(circles[0].image)], lab)["iou"] > 0.95
