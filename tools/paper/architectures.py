"""The paper's ablation study: what the copy and the zero convolutions are good for, by how little a prompt says."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from controlnet.worlds import Sample

from .cost import training_costs
from .experiment import Experiment
from .lab import Lab, circles_measured
from .sheets import save_sheet
from .statistics import Numbers, Verdict, above, judged, shown, table

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

    def of_seed(seed: int) -> dict[str, dict[str, float]]:
        rows, sheet = {}, {"hints": [sample.hint for sample in lab.circles]}
        for architecture in architectures:
            net = lab.load(lab.train(seed, **settings_of(architecture)))
            for kind in kinds:
                images = lab.draw_circles(net, [PROMPTS[kind](sample) for sample in lab.circles])
                rows[f"{architecture}, {kind}"] = circles_measured(images, lab.circles)
                sheet[f"{architecture}, {kind}"] = images
        if seed == 0:
            save_sheet(lab, name, sheet)
        return rows

    fidelity = lab.over_seeds(of_seed)
    seconds = {each: lab.train(0, **settings_of(each)).seconds_per_step() for each in architectures}
    costs = {each: {**training_costs(lab, each), "seconds": seconds[each]} for each in architectures}
    return {"kinds": kinds, "fidelity": fidelity, "costs": costs}


def tables(numbers: dict) -> list[str]:
    found: Numbers = numbers["fidelity"]

    def rows(measure: str, kinds: Iterable[str]) -> list[list[str]]:
        return [[name, *(shown(found[f"{name}, {kind}"][measure]) for kind in kinds)] for name in numbers["costs"]]

    named = [kind for kind in numbers["kinds"] if kind in ("conflicting", "perfect")]  # these prompts name colours
    units = {"trained": 1e6, "memory": 1e6, "operations": 1e9, "seconds": 1e-3}
    costs = [
        [name, *(f"{cost[what] / unit:.3g}" for what, unit in units.items())] for name, cost in numbers["costs"].items()
    ]
    return [
        table(["IoU with the hint", *numbers["kinds"]], rows("iou", numbers["kinds"])),
        table(["both colours right", *named], rows("colours", named)),
        table(["a step", "million trained parameters", "memory in MB, counted", "GFLOP", "ms, measured"], costs),
    ]


def of(numbers: dict, architecture: str, kind: str) -> list[float]:
    return numbers["fidelity"][f"{architecture}, {kind}"]["iou"]


def verdict(numbers: dict) -> Verdict:
    lost = {
        (name, kind): above(of(numbers, "full", kind), of(numbers, name, kind))
        for name in ("lite", "gaussian")
        for kind in ("no prompt", "insufficient")
    }
    words = ", ".join(
        f"{name} is {'below' if low else 'not below'} it with {kind}" for (name, kind), low in lost.items()
    )
    return judged(of(numbers, "full", "no prompt"), all(lost.values()), f"beside the full ControlNet {words}")


EXPERIMENT = Experiment(
    title="Architectures and prompts (Figure 8, section 4.2)",
    claim="ControlNet succeeds with all four kinds of prompt; ControlNet-lite fails without a sufficient prompt, and "
    "with Gaussian convolutions in place of the zero convolutions performance drops to about that of lite.",
    how="Circles. The insufficient prompt names the figure alone, the conflicting one a square in place of the circle. "
    "All have the same steps on the same images. A disc is the simplest figure there is, and needs less of a prompt "
    "than a house.",
    measure=partial(measure, name="architectures", architectures=PAPERS, kinds=tuple(PROMPTS)),
    tables=tables,
    verdict=verdict,
)
