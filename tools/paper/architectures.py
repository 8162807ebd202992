"""The paper's ablation study: what the copy and the zero convolutions are good for, by how little a prompt says."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean

import numpy as np

from controlnet.worlds import Sample

from .cost import counted, machine, seconds_of
from .experiment import Experiment
from .lab import BATCH, OPTIMIZER, Lab, circles_measured
from .runs import last_loss, set_in
from .statistics import IS, LEARNED, Numbers, Verdict, above, all_of, judged, shown, steps_shown, table

PROMPTS: dict[str, Callable[[Sample], str]] = {
    "no prompt": lambda sample: "",
    "insufficient": lambda sample: "circle",
    "conflicting": lambda sample: sample.caption.replace("circle", "square"),
    "perfect": lambda sample: sample.caption,
}
PAPERS = ("full", "lite", "gaussian")


def settings_of(architecture: str) -> dict:
    return {} if architecture == "full" else {"architecture": architecture}


def measure(lab: Lab, name: str, architectures: Sequence[str], kinds: Sequence[str]) -> dict:
    """Every architecture with every kind of prompt, and what it costs."""

    def draw(seed: int) -> dict[str, list[np.ndarray]]:
        drawn = {}
        for architecture in architectures:
            net = lab.load(lab.train(seed, **settings_of(architecture)))
            for kind in kinds:
                prompts = [PROMPTS[kind](sample) for sample in lab.circles]
                drawn[f"{architecture}, {kind}"] = lab.draw_circles(net, prompts)
        return drawn

    fidelity = lab.drawn_over_seeds(name, draw, partial(circles_measured, circles=lab.circles))
    trainings = {each: trainings_of(lab, each) for each in architectures}
    counts = {each: counted(lab.sd.config, BATCH, architecture=each, optimizer=OPTIMIZER) for each in architectures}
    costs = {each: vars(counts[each]) | {"seconds": seconds_of(lab, architecture=each)} for each in architectures}
    return {"kinds": kinds, "fidelity": fidelity, "trainings": trainings, "costs": costs, "device": machine(lab)}


def trainings_of(lab: Lab, architecture: str) -> dict[str, list]:
    """For each seed the step at which control sets in, or None, and the last validation loss."""
    logs = [lab.train(seed, **settings_of(architecture)).log() for seed in range(lab.scale.seeds)]
    return {
        "set_in": [set_in(log) for log in logs],
        "validation_loss": [last_loss(log) for log in logs],
    }


def tables(numbers: dict) -> list[str]:
    found: Numbers = numbers["fidelity"]

    def rows(measure: str, kinds: Iterable[str]) -> list[list[str]]:
        return [[name, *(shown(found[f"{name}, {kind}"][measure]) for kind in kinds)] for name in numbers["costs"]]

    named = [kind for kind in numbers["kinds"] if kind in ("conflicting", "perfect")]  # these prompts name colours
    units = {"trained": 1e6, "memory": 1e6, "operations": 1e9, "seconds": 1e-3}
    costs = [
        [name, *(f"{cost[what] / unit:.3g}" for what, unit in units.items())] for name, cost in numbers["costs"].items()
    ]
    trainings = [
        [name, steps_shown(one["set_in"]), shown(one["validation_loss"], digits=4)]
        for name, one in numbers["trainings"].items()
    ]
    looked = "control sets in at step (full is looked at twice as often)"
    return [
        table(["IoU with the hint", *numbers["kinds"]], rows("iou", numbers["kinds"])),
        table(["both colours right", *named], rows("colours", named)),
        table(["a training", looked, "validation loss at the end"], trainings),
        table(
            ["a step", "million trained parameters", "MB, counted", "GFLOP", f"ms in fp32 on {numbers['device']}"],
            costs,
        ),
    ]


def ious_of(numbers: dict, architecture: str, kind: str) -> list[float]:
    return numbers["fidelity"][f"{architecture}, {kind}"]["iou"]


def below_full(numbers: dict, name: str, kind: str) -> bool | None:
    return above(ious_of(numbers, "full", kind), ious_of(numbers, name, kind))


def alike(numbers: dict, kind: str) -> bool:
    """Whether lite and gaussian are nearer to each other than either is to the full ControlNet."""
    full, lite, gaussian = (fmean(ious_of(numbers, name, kind)) for name in PAPERS)
    return abs(lite - gaussian) < full - max(lite, gaussian)


def verdict(numbers: dict) -> Verdict:
    succeeds = all(fmean(ious_of(numbers, "full", kind)) >= LEARNED for kind in PROMPTS)
    answers, words = [succeeds], [f"the full ControlNet {'succeeds' if succeeds else 'does not succeed'} with all four"]
    for kind in ("no prompt", "insufficient"):
        below = {name: below_full(numbers, name, kind) for name in ("lite", "gaussian")}
        same = all_of(*below.values()) and alike(numbers, kind)
        answers += [*below.values(), same]
        said = ", ".join(f"{name} {IS[low]} below it" for name, low in below.items())
        words.append(f"with {kind} {said}{', and they are about alike' if same else ''}")
    return judged(ious_of(numbers, "full", "perfect"), all_of(*answers), "; ".join(words))


EXPERIMENT = Experiment(
    title="Architectures and prompts (Figure 8, section 4.2)",
    claim="ControlNet succeeds with all four kinds of prompt; ControlNet-lite fails without a sufficient prompt, and "
    "with Gaussian convolutions in place of the zero convolutions performance drops to about that of lite.",
    how="Circles. Success is an IoU of 0.5 with the hint. The insufficient prompt names the figure alone, the "
    "conflicting one a square in place of the circle. All have the same steps on the same images. A disc is the "
    "simplest figure there is, and needs less of a prompt than a house: where all follow it, the validation loss still "
    "tells them apart. It is not judged.",
    measure=partial(measure, name="architectures", architectures=PAPERS, kinds=tuple(PROMPTS)),
    tables=tables,
    verdict=verdict,
)
