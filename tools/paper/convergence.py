"""When control sets in: the paper's "sudden convergence phenomenon"."""

from statistics import fmean

from controlnet.training.convergence import Convergence
from tools.page.charts import Points

from .experiment import Experiment
from .lab import Lab, circles_measured
from .runs import Run
from .statistics import Verdict, judged, shown, table

# One seed each: they are there to show how the step depends on the settings.
VARIANTS = {
    "learning rate 3e-4": {"lr": 3e-4},
    "learning rate 3e-3": {"lr": 3e-3},
    "batch of 4": {"batch_size": 4},
    "batch of 32": {"batch_size": 32},
    "all prompts kept": {"prompt_dropout": 0.0},
    "all prompts dropped": {"prompt_dropout": 1.0},
}
SUDDEN = 0.25  # of the steps: in less than this the IoU makes the middle half of its way


def measure(lab: Lab) -> dict:
    runs = [lab.train(seed) for seed in range(lab.scale.seeds)]
    kinds = {"default": runs} | {name: [lab.train(0, **settings)] for name, settings in VARIANTS.items()}
    return {
        "steps": lab.scale.steps,
        "watched": [{name: watched(run.log(), name) for name in ("iou", "validation_loss")} for run in runs],
        "zero_convs": [[(step, fmean(norms)) for step, norms in watched(run.log(), "zero_convs")] for run in runs],
        "measures": {name: watched(trained[0].log(), "control_measure") for name, trained in kinds.items()},
        "kinds": {name: [outcome(lab, run) for run in trained] for name, trained in kinds.items()},
    }


def watched(log: list[dict], name: str) -> list[tuple[int, object]]:
    return [(line["step"], line[name]) for line in log if name in line]


def outcome(lab: Lab, run: Run) -> dict:
    convergence = Convergence(lab.scale.steps)
    for line in run.log():
        if "control_measure" in line:
            convergence.news(line["step"], line["validation_loss"], line["control_measure"])
    images = lab.draw_circles(lab.load(run))
    return {"set_in": convergence.set_in, **circles_measured(images, lab.circles)}


def jump(points: Points) -> tuple[float, float]:
    """The steps between which a curve makes the middle half of its way from its first value to its highest."""
    first, highest = points[0][1], max(value for _, value in points)
    quarter, most = (first + share * (highest - first) for share in (0.25, 0.75))
    end = next(step for step, value in points if value >= most)
    start = max((step for step, value in points if step <= end and value <= quarter), default=points[0][0])
    return start, end


def fall(curves: dict[str, Points]) -> tuple[float, float]:
    """By which share the validation loss falls in the jump, and from the first validation to the last."""
    start, end = jump(curves["iou"])
    loss = dict(map(tuple, curves["validation_loss"]))
    steps = sorted(loss)
    return 1 - loss[end] / loss[start], 1 - loss[steps[-1]] / loss[steps[0]]


def tables(numbers: dict) -> list[str]:
    rows = []
    for i, curves in enumerate(numbers["watched"]):
        start, end = jump(curves["iou"])
        falls = [f"{share:.1%}" for share in fall(curves)]
        rows.append([f"seed {i}", f"{start} to {end}", *falls])
    kinds = []
    for name, found in numbers["kinds"].items():
        steps = ", ".join(str(one["set_in"] or "never") for one in found)
        kinds.append([name, steps, shown([one["iou"] for one in found])])
    head = ["", "IoU's middle half, steps", "validation loss falls by in it", "in all"]
    return [table(head, rows), table(["", "control sets in at step", "IoU without prompt at the end"], kinds)]


def verdict(numbers: dict) -> Verdict:
    widths = [end - start for start, end in (jump(curves["iou"]) for curves in numbers["watched"])]
    reached = [max(value for _, value in curves["iou"]) for curves in numbers["watched"]]
    share = max(widths) / numbers["steps"]
    words = f"the IoU makes the middle half of its way within {share:.0%} of the steps at most"
    return judged(reached, share <= SUDDEN, f"{words} (sudden: up to {SUDDEN:.0%})")


def charts(numbers: dict) -> dict[str, dict[str, Points]]:
    curves = {"IoU": "iou", "validation loss": "validation_loss"}
    seeds = range(len(numbers["watched"]))
    drawn = {title: {f"seed {i}": numbers["watched"][i][name] for i in seeds} for title, name in curves.items()}
    drawn["norm of the zero convolutions"] = {f"seed {i}": numbers["zero_convs"][i] for i in seeds}
    return drawn | {"control measure": numbers["measures"]}


EXPERIMENT = Experiment(
    title="Sudden convergence (Figure 4, section 3.3)",
    claim="The model does not learn the condition gradually: it begins to follow it suddenly, usually within 10,000 "
    "steps.",
    how="Circles, whose IoU with their hints is exact. The IoU on the curve is that of 8 images with their prompts, 10 "
    "steps each; control has set in where another image's hint makes the validation loss 1% higher. That it takes "
    "hundreds of steps and not thousands is the doing of the small world and of Muon.",
    measure=measure,
    tables=tables,
    verdict=verdict,
    charts=charts,
)
