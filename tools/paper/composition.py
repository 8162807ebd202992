"""Two ControlNets at once, their residuals added."""

from collections.abc import Sequence
from itertools import starmap

import numpy as np

from controlnet.worlds import Fill50k
from controlnet.worlds.colours import BASIC_COLOURS
from controlnet.worlds.hints import edges
from controlnet.worlds.measures import foreground, iou

from .experiment import Experiment
from .lab import Lab
from .sheets import save_sheet
from .statistics import Verdict, above, judged, numbers_table, shown

OUTLINE, EDGES, AGREEING, DISAGREEING = "outline alone", "edges alone", "both, of one picture", "both, of two pictures"


def measure(lab: Lab) -> dict:
    world = Fill50k(lab.sd.config.resolution, colours=BASIC_COLOURS, held_out=True)
    outlines = [sample.hint for sample in lab.circles]
    edge_hints = [edges(world.draw(i)) for i in range(len(outlines))]
    prompts = [sample.caption for sample in lab.circles]
    masks = [sample.mask for sample in lab.circles]

    def of_seed(seed: int) -> dict[str, dict[str, float]]:
        circles, shapes = lab.load(lab.train(seed)), lab.load(lab.train(seed, data="shapes"))
        controls = {
            OUTLINE: [(circles, outlines)],
            EDGES: [(shapes, edge_hints)],
            AGREEING: [(circles, outlines), (shapes, edge_hints)],
            DISAGREEING: [(circles, outlines), (shapes, turned(edge_hints))],
        }
        drawn = {name: lab.draw(acting, prompts) for name, acting in controls.items()}
        if seed == 0:
            hints = {"outlines": outlines, "edges": edge_hints, "edges of another": turned(edge_hints)}
            save_sheet(lab, "composition", hints | drawn)
        others = {name: turned(masks) if name == DISAGREEING else masks for name in drawn}
        return {name: followed(images, masks, others[name]) for name, images in drawn.items()}

    return {"controls": lab.over_seeds(of_seed)}


def turned(items: list) -> list:
    """Those of the next picture."""
    return items[1:] + items[:1]


def followed(images: list, outlines: Sequence[np.ndarray], edges: Sequence[np.ndarray]) -> dict[str, float]:
    seen = [foreground(image) for image in images]
    either = [a | b for a, b in zip(outlines, edges, strict=True)]
    asked = {"outline": outlines, "edges": edges, "either": either}
    return {name: float(np.mean(list(starmap(iou, zip(seen, masks, strict=True))))) for name, masks in asked.items()}


def tables(numbers: dict) -> list[str]:
    columns = {"outline": "IoU with the outline's disc", "edges": "with the edges' disc", "either": "with both discs"}
    return [numbers_table(numbers["controls"], columns)]


def verdict(numbers: dict) -> Verdict:
    found = {name: row["outline"] for name, row in numbers["controls"].items()}
    lost = any(above(found[alone], found[AGREEING]) for alone in (OUTLINE, EDGES))
    words = f"two hints of one picture reach an IoU of {shown(found[AGREEING])}, the better one alone "
    better = max((found[OUTLINE], found[EDGES]), key=sum)
    return judged(min((found[OUTLINE], found[EDGES]), key=sum), not lost, f"{words}{shown(better)}")


EXPERIMENT = Experiment(
    title="Composition (Figure 6, section 3.4)",
    claim="Several conditions compose by adding the outputs of their ControlNets, without extra weights.",
    how="One ControlNet reads outlines of circles, the other, trained on `shapes`, Canny edges; both are asked for "
    "discs, with prompts, by the plain sum of their residuals. Of hints of two pictures no image can follow both with "
    "one disc: what comes out is shown.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
