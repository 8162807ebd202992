"""How many pictures it takes."""

from .experiment import Experiment
from .lab import BATCH, Lab, circles_measured
from .sheets import save_sheet
from .statistics import Verdict, above, judged, numbers_table, shown

FEW, ENDLESS = "1,000", "10,000, or endless: none is seen twice"
SIZES = {
    "100": {"images": 100},
    FEW: {"images": 1000},
    "2,000, as in the other experiments": {},
    ENDLESS: {"images": None, "no_cache": True},
}


def measure(lab: Lab) -> dict:
    def of_seed(seed: int) -> dict[str, dict[str, float]]:
        rows, sheet = {}, {"hints": [sample.hint for sample in lab.circles]}
        for size, settings in SIZES.items():
            net = lab.load(lab.train(seed, **settings))
            sheet[size] = lab.draw_circles(net)
            prompted = lab.draw_circles(net, [sample.caption for sample in lab.circles])
            rows[size] = {
                "iou": circles_measured(sheet[size], lab.circles)["iou"],
                **{f"prompted {name}": value for name, value in circles_measured(prompted, lab.circles).items()},
            }
        if seed == 0:
            save_sheet(lab, "data_size", sheet)
        return rows

    return {"seen": lab.scale.steps * BATCH, "sizes": lab.over_seeds(of_seed)}


def tables(numbers: dict) -> list[str]:
    columns = {
        "iou": "IoU without prompt",
        "prompted iou": "IoU with it",
        "prompted colours": "both colours right with it",
    }
    seen = f"Each training looks at {numbers['seen']:,} pictures: of a larger set it sees a part, of a smaller one all "
    return [f"{seen}again and again.", numbers_table(numbers["sizes"], columns, "pictures")]


def verdict(numbers: dict) -> Verdict:
    least, endless = (numbers["sizes"][size]["iou"] for size in (FEW, ENDLESS))
    grows = above(endless, numbers["sizes"]["100"]["iou"])
    collapsed = sum(least) < 0.5 * sum(endless)
    words = f"with 1,000 pictures the IoU is {shown(least)}, with endless ones {shown(endless)}"
    return judged(
        endless, not collapsed, f"{words}; it {'grows' if grows else 'does not grow'} from 100 to endless ones"
    )


EXPERIMENT = Experiment(
    title="Size of the data set (Figure 10, section 4.4)",
    claim="Training does not collapse with 1,000 images, and the results get better with more.",
    how="Circles, at equal steps, measured on hints that no training has seen. Two colours, a place and a radius are "
    "all that a picture of this world can differ in, so few show most of it: a thousand photographs do not.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
