"""The paper's ablation study: what the copy and the zero convolutions are good for, by how little a prompt says."""

from collections.abc import Callable, Iterable
from functools import partial

from controlnet.worlds import Sample

from .cost import training_costs
from .experiment import Experiment
from .lab import Lab, circles_measured
from .sheets import save_sheet
from .statistics import Numbers, Verdict, above, shown, table

PROMPTS: dict[str, Callable[[Sample], str]] = {
    "no prompt": lambda sample: "",
    "insufficient": lambda sample: "circle",
    "conflicting": lambda sample: sample.caption.replace("circle", "square"),
    "perfect": lambda sample: sample.caption,
}
PAPERS = ("full", "lite", "gaussian")


def measure(lab: Lab, name: str, architectures: tuple[str, ...]) -> dict:
    """Every architecture with every kind of prompt, and what it costs."""

    def of_seed(seed: int) -> dict[str, dict[str, float]]:
        rows, sheet = {}, {"hints": [sample.hint for sample in lab.circles]}
        for architecture in architectures:
            run = lab.train(seed, **({} if architecture == "full" else {"architecture": architecture}))
            net = lab.load(run)
            for kind, prompt in PROMPTS.items():
                images = lab.draw_circles(net, [prompt(sample) for sample in lab.circles])
                rows[f"{architecture}, {kind}"] = circles_measured(images, lab.circles)
                sheet[f"{architecture}, {kind}"] = images
        if seed == 0:
            save_sheet(lab, name, sheet)
        return rows

    costs = {architecture: training_costs(lab, architecture) for architecture in architectures}
    return {"fidelity": lab.over_seeds(of_seed), "costs": costs}


def tables(numbers: dict) -> list[str]:
    found: Numbers = numbers["fidelity"]

    def rows(measure: str, kinds: Iterable[str]) -> list[list[str]]:
        return [[name, *(shown(found[f"{name}, {kind}"][measure]) for kind in kinds)] for name in numbers["costs"]]

    named = ("conflicting", "perfect")  # these prompts name the colours
    costs = [
        [name, f"{cost['trained'] / 1e6:.2f} M", f"{cost['memory'] / 1e6:.0f} MB", f"{cost['operations'] / 1e9:.1f}"]
        for name, cost in numbers["costs"].items()
    ]
    return [
        table(["IoU with the hint", *PROMPTS], rows("iou", PROMPTS)),
        table(["both colours right", *named], rows("colours", named)),
        table(["a step", "trained parameters", "memory", "GFLOP"], costs),
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
    return Verdict(all(lost.values()), f"beside the full ControlNet {words}")


EXPERIMENT = Experiment(
    title="Architectures and prompts (Figure 8, section 4.2)",
    claim="ControlNet succeeds with all four kinds of prompt; ControlNet-lite fails without a sufficient prompt, and "
    "with Gaussian convolutions in place of the zero convolutions performance drops to about that of lite.",
    how="Circles. The insufficient prompt names the figure alone, the conflicting one a square in place of the circle. "
    "All have the same steps on the same images. A disc is the simplest figure there is: it needs less of a prompt than "
    "a house does.",
    measure=partial(measure, name="architectures", architectures=PAPERS),
    tables=tables,
    verdict=verdict,
)
