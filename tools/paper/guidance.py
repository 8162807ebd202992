"""What classifier-free guidance does to a hint without a prompt."""

from statistics import fmean

import numpy as np

from .experiment import Experiment
from .lab import Lab, follows
from .sheets import save_sheet
from .statistics import Verdict, above, judged, numbers_table

WITHOUT, BOTH, ALONE = "no guidance", "guidance, hint in both branches", "guidance, hint in the prompt's branch alone"
WEIGHTED = "the same with resolution weighting"
# The mode of a control (controlnet/guidance.py), and the scale of the guidance: None is the base's own.
WAYS = {
    WITHOUT: ("balanced", 1.0),
    BOTH: ("balanced", None),
    ALONE: ("prompt", None),
    WEIGHTED: ("resolution", None),
    "the same, read literally": ("resolution-literal", None),
    "guess mode": ("guess", None),
}


def measure(lab: Lab) -> dict:
    def of_seed(seed: int) -> dict[str, dict[str, float]]:
        net, sheet = lab.load(lab.train(seed)), {"hints": [sample.hint for sample in lab.circles]}
        for name, (mode, cfg) in WAYS.items():
            sheet[name] = lab.draw_circles(net, mode=mode, cfg=cfg)
        if seed == 0:
            save_sheet(lab, "guidance", sheet)
        return {name: {"iou": follows(sheet[name], lab.circles), "contrast": contrast(sheet[name])} for name in WAYS}

    return {"ways": lab.over_seeds(of_seed), "true": contrast([sample.image for sample in lab.circles])}


def contrast(images: list[np.ndarray]) -> float:
    """The mean over images of the standard deviation of their pixels, 0 to 0.5."""
    return float(np.mean([(image / 255).std() for image in images]))


def tables(numbers: dict) -> list[str]:
    columns = {"iou": "IoU with the hint", "contrast": "contrast"}
    return [numbers_table(numbers["ways"], columns), f"The true pictures have a contrast of {numbers['true']:.2f}."]


def verdict(numbers: dict) -> Verdict:
    of = {name: row["contrast"] for name, row in numbers["ways"].items()}
    removed = abs(fmean(of[BOTH]) - fmean(of[WITHOUT])) < 0.01
    strong, milder = above(of[ALONE], of[BOTH]), above(of[ALONE], of[WEIGHTED])
    words = [
        f"with the hint in both branches guidance {'has no effect' if removed else 'has an effect'}",
        f"with the hint in one it {'is stronger' if strong else 'is not stronger'}",
        f"and resolution weighting {'makes it milder' if milder else 'does not make it milder'}",
    ]
    followed = numbers["ways"][BOTH]["iou"]
    return judged(followed, removed and strong and milder, ", ".join(words))


EXPERIMENT = Experiment(
    title="Guidance without a prompt (Figure 5, section 3.4)",
    claim="Added to both branches the hint removes classifier-free guidance altogether, added to the prompt's branch "
    "alone it makes it very strong, and weighting by resolution is the remedy.",
    how="Circles, no prompts, no negative prompts. Contrast stands for the strength of guidance. The weights of the "
    "paper are 64 / side of a block, 1 to 8, read literally, and that divided by the largest as it works here.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
