"""What classifier-free guidance does to a hint without a prompt."""

import numpy as np

from controlnet.guidance import layer_weights

from .experiment import Experiment
from .lab import Lab, follows
from .statistics import IS, Numbers, Verdict, above, all_of, judged, lost, numbers_table

WITHOUT, BOTH, ALONE = "no guidance", "guidance, hint in both branches", "guidance, hint in the prompt's branch alone"
LITERAL, WEIGHTED = "the same, weighted by resolution", "the same, these weights divided by the largest"
# The mode of a control (controlnet/guidance.py), and the scale of the guidance: None is the base's own.
WAYS = {
    WITHOUT: ("balanced", 1.0),
    BOTH: ("balanced", None),
    ALONE: ("prompt", None),
    LITERAL: ("resolution-literal", None),
    WEIGHTED: ("resolution", None),
    "guess mode": ("guess", None),
}


def measure(lab: Lab) -> dict:
    def draw(seed: int) -> dict[str, list[np.ndarray]]:
        net = lab.load(lab.train(seed))
        return {name: lab.draw_circles(net, mode=mode, cfg=cfg) for name, (mode, cfg) in WAYS.items()}

    def measured(images: list[np.ndarray]) -> dict[str, float]:
        return {"iou": follows(images, lab.circles), "contrast": contrast(images)}

    return {
        "ways": lab.drawn_over_seeds("guidance", draw, measured),
        "true": contrast([sample.image for sample in lab.circles]),
        "weights": layer_weights("resolution-literal", (), lab.sd.config.unet),
    }


def contrast(images: list[np.ndarray]) -> float:
    """The mean over images of the standard deviation of their pixels, 0 to 0.5."""
    return float(np.mean([(image / 255).std() for image in images]))


def tables(numbers: dict) -> list[str]:
    columns, weights = {"iou": "IoU with the hint", "contrast": "contrast"}, numbers["weights"]
    words = f"True pictures have a contrast of {numbers['true']:.2f}; weights are {min(weights):g} to {max(weights):g}."
    return [numbers_table(numbers["ways"], columns), words]


def verdict(numbers: dict) -> Verdict:
    ways = numbers["ways"]
    strong = above(ways[ALONE]["contrast"], ways[BOTH]["contrast"])
    cures = {name: cured(ways, name) for name in (LITERAL, WEIGHTED)}
    words = [
        f"with the hint in the prompt's branch alone guidance {IS[strong]} stronger",
        f"weighting by resolution as it is written {IS[cures[LITERAL]]} a remedy",
        f"divided by the largest weight it {IS[cures[WEIGHTED]]} one",
    ]
    return judged(ways[BOTH]["iou"], all_of(strong, cures[LITERAL]), "; ".join(words))


def cured(ways: Numbers, name: str) -> bool | None:
    """Whether guidance is milder in this way, and the hint still followed: no control at all would be the mildest."""
    milder = above(ways[ALONE]["contrast"], ways[name]["contrast"])
    return all_of(milder, not lost(ways[BOTH]["iou"], ways[name]["iou"]))


EXPERIMENT = Experiment(
    title="Guidance without a prompt (Figure 5, section 3.4)",
    claim="Added to both branches the hint removes classifier-free guidance altogether, added to the prompt's branch "
    "alone it makes it very strong, and weighting by resolution is the remedy.",
    how="Circles, no prompts, no negative prompts. Contrast stands for the strength of guidance. With the hint in both "
    "branches these are one and the same here, so guidance is removed by construction: that is not judged. The weights "
    "are 64 / side of a block, as the paper writes them, judged, and the same divided by the largest, this project's "
    "`resolution`. Weights above 1 are more than a control was trained with: they leave smudges.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
