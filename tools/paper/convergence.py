"""When control sets in: the paper's "sudden convergence phenomenon"."""

from statistics import fmean

import numpy as np

from controlnet import ControlNet
from controlnet.training.charts import Points
from controlnet.worlds import Fill50k
from tools.convergence import images_in

from .experiment import Experiment
from .lab import SHOWN, WATCHED, Lab, circles_measured, follows, save_sheet
from .runs import Run, set_in, watched
from .statistics import Verdict, all_of, judged, shown, steps_shown, table

# One seed each: they are there to show how the step depends on the settings.
VARIANTS = {
    "learning rate 3e-4": {"lr": 3e-4},
    "learning rate 3e-3": {"lr": 3e-3},
    "batch of 4": {"batch_size": 4},
    "batch of 32": {"batch_size": 32},
    "all prompts kept": {"prompt_dropout": 0.0},
    "all prompts dropped": {"prompt_dropout": 1.0},
}
# The middle half of the IoU's way takes this share of the steps up to its end: none, if the IoU jumps; 67%, if it rises
# in a line; 79%, if it approaches its end exponentially. The length of the run does not count.
SUDDEN = 1 / 3


def measure(lab: Lab) -> dict:
    runs = [lab.train(seed) for seed in range(lab.scale.seeds)]
    kinds = {"default": runs} | {name: [lab.train(0, **settings)] for name, settings in VARIANTS.items()}
    start = (0, untrained(lab))
    save_sheet(lab, "convergence", along_the_steps(runs[0]))
    return {
        "iou": [[start, *watched(run.log(), "iou")] for run in runs],
        "validation_loss": [watched(run.log(), "validation_loss") for run in runs],
        "zero_convs": [[(step, fmean(norms)) for step, norms in watched(run.log(), "zero_convs")] for run in runs],
        "measures": {name: watched(trained[0].log(), "control_measure") for name, trained in kinds.items()},
        "kinds": {name: [outcome(lab, run) for run in trained] for name, trained in kinds.items()},
    }


def along_the_steps(run: Run) -> dict[str, list[np.ndarray]]:
    """The first samples of every other grid up to the last, as in the paper's figure."""
    files = run.folder.grids()[::-2][::-1]
    hints, _, _ = images_in(run.folder, files[0], SHOWN)
    return {"hints": hints} | {f"step {int(file.stem)}": images_in(run.folder, file, SHOWN)[1] for file in files}


def untrained(lab: Lab) -> float:
    """The IoU of train.py's grids, made by a ControlNet as it starts: what the base paints without one."""
    world = Fill50k(lab.sd.config.resolution, held_out=True)
    samples = [world[i] for i in range(WATCHED)]
    control = ControlNet.from_unet(lab.sd.unet), [sample.hint for sample in samples]
    return follows(lab.draw([control], [sample.caption for sample in samples]), samples)


def outcome(lab: Lab, run: Run) -> dict:
    images = lab.draw_circles(lab.load(run))
    return {"set_in": set_in(run.log()), **circles_measured(images, lab.circles)}


def jump(points: Points) -> tuple[float, float]:
    """The steps between which a curve makes the middle half of its way from its first value, at step 0, to its highest:
    the last measured before, and the first after. Where there is no way up it ends with the run."""
    first, highest = points[0][1], max(value for _, value in points)
    quarter, most = (first + share * (highest - first) for share in (0.25, 0.75))
    end = next((step for step, value in points[1:] if value >= most), points[-1][0])
    start = max((step for step, value in points if step < end and value <= quarter), default=0)
    return start, end


def shares(points: Points) -> tuple[float, float]:
    """What the jump takes of the steps up to its end, at least and at most: between two measurements it may lie
    anywhere."""
    start, end = jump(points)
    steps = [step for step, _ in points]
    after, before = steps[steps.index(start) + 1], steps[steps.index(end) - 1]
    return 1 - after / before if after < before else 0.0, 1 - start / end


def fall(iou: Points, loss: Points) -> tuple[float, float]:
    """The share by which the validation loss falls in the jump, and from the first validation to the last."""
    at, first, last = dict(map(tuple, loss)), loss[0][0], loss[-1][0]
    start, end = (max(step, first) for step in jump(iou))
    return 1 - at[end] / at[start], 1 - at[last] / at[first]


def tables(numbers: dict) -> list[str]:
    rows = []
    for i, (iou, loss) in enumerate(zip(numbers["iou"], numbers["validation_loss"], strict=True)):
        start, end = jump(iou)
        rows.append([f"seed {i}", f"{start} to {end}", *(f"{share:.1%}" for share in fall(iou, loss))])
    kinds = []
    for name, found in numbers["kinds"].items():
        kinds.append([name, steps_shown(one["set_in"] for one in found), shown([one["iou"] for one in found])])
    head = ["", "IoU's middle half, steps", "validation loss falls by in it", "in all"]
    return [table(head, rows), table(["", "control sets in at step", "IoU without prompt at the end"], kinds)]


def verdict(numbers: dict) -> Verdict:
    reached = [max(value for _, value in points) for points in numbers["iou"]]
    widths = [shares(points) for points in numbers["iou"]]
    sudden = [True if most <= SUDDEN else False if least > SUDDEN else None for least, most in widths]
    taken = ", ".join(f"{least:.0%} to {most:.0%}" for least, most in widths)
    words = f"of the steps up to there, the middle half of the IoU's way takes {taken}"
    return judged(reached, all_of(*sudden), f"{words} (sudden: up to {SUDDEN:.0%}; a straight rise: 67%)")


def charts(numbers: dict) -> dict[str, dict[str, Points]]:
    titles = {"iou": "IoU", "validation_loss": "validation loss", "zero_convs": "norm of the zero convolutions"}
    drawn = {title: {f"seed {i}": points for i, points in enumerate(numbers[name])} for name, title in titles.items()}
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
