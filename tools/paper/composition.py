"""Two ControlNets at once, their residuals added."""

from collections.abc import Sequence
from functools import partial
from itertools import starmap

import numpy as np

from controlnet.worlds.hints import edges
from controlnet.worlds.measures import foreground, iou
from tools.paint import mismatched

from .experiment import Experiment
from .lab import Lab
from .statistics import Verdict, above, all_of, judged, lost, numbers_table, shown

OUTLINE, EDGES, AGREEING, DISAGREEING = "outline alone", "edges alone", "both, of one picture", "both, of two pictures"
LEFT, RIGHT, HALVES = "left half of the outline alone", "right half of the edges alone", "both halves, of one picture"


def measure(lab: Lab) -> dict:
    outlines, masks = ([getattr(sample, name) for sample in lab.circles] for name in ("hint", "mask"))
    edge_hints = [edges(lab.world.draw(i)) for i in range(len(outlines))]
    prompts = [sample.caption for sample in lab.circles]

    def draw(seed: int) -> dict[str, list[np.ndarray]]:
        circles, shapes = lab.load(lab.train(seed)), lab.load(lab.train(seed, data="shapes"))
        left, right = (circles, halves(outlines, left=True)), (shapes, halves(edge_hints, left=False))
        controls = {
            OUTLINE: [(circles, outlines)],
            EDGES: [(shapes, edge_hints)],
            AGREEING: [(circles, outlines), (shapes, edge_hints)],
            LEFT: [left],
            RIGHT: [right],
            HALVES: [left, right],
            DISAGREEING: [(circles, outlines), (shapes, mismatched(edge_hints))],
        }
        return {name: lab.draw(acting, prompts) for name, acting in controls.items()}

    hints = {"outlines": outlines, "edges": edge_hints}
    return {"controls": lab.drawn_over_seeds("composition", draw, partial(followed, masks=masks), hints)}


def halves(hints: Sequence[np.ndarray], left: bool) -> list[np.ndarray]:
    """The hints with one half black."""
    kept = (np.arange(hints[0].shape[1]) < hints[0].shape[1] // 2) == left
    return [hint * kept[None, :, None] for hint in hints]


def followed(images: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    seen = [foreground(image) for image in images]
    either = [a | b for a, b in zip(masks, mismatched(masks), strict=True)]
    asked = {"own": masks, "next": mismatched(masks), "either": either}
    return {name: float(np.mean(list(starmap(iou, zip(seen, wanted, strict=True))))) for name, wanted in asked.items()}


def tables(numbers: dict) -> list[str]:
    columns = {"own": "IoU with the disc", "next": "with that of the next picture", "either": "with both"}
    return [numbers_table(numbers["controls"], columns)]


def verdict(numbers: dict) -> Verdict:
    found = {name: row["own"] for name, row in numbers["controls"].items()}
    worse, better = sorted((found[OUTLINE], found[EDGES]), key=sum)
    composed = all_of(above(found[HALVES], found[LEFT]), above(found[HALVES], found[RIGHT]))
    words = (
        f"by a half of the hint each, they reach an IoU of {shown(found[HALVES])} together, {shown(found[LEFT])} and "
        f"{shown(found[RIGHT])} alone; by whole hints {shown(found[AGREEING])}, the better one alone {shown(better)}"
    )
    return judged(worse, all_of(composed, not lost(better, found[AGREEING])), words)


EXPERIMENT = Experiment(
    title="Composition (Figure 6, section 3.4)",
    claim="Several conditions compose by adding the outputs of their ControlNets, without extra weights.",
    how="One ControlNet reads outlines of circles, the other, trained on `shapes`, Canny edges; both are asked for "
    "discs, with prompts, by the plain sum of their residuals. They compose if each adds to what the other knows: one "
    "sees the left half of the picture's hint, the other the right half. Of two pictures (the edges are those of the "
    "next one) no image can follow both hints with one disc: what comes out is shown only, and the other rows say what "
    "chance gives.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
