"""How many pictures it takes."""

from .experiment import Experiment
from .lab import BATCH, Lab, circles_measured, save_sheet
from .runs import last_loss
from .statistics import IS, Verdict, above, all_of, judged, shown, table

FEW, ENDLESS = "100", "endless"
MEASURES = "iou", "prompted iou", "prompted colours"


def measure(lab: Lab) -> dict:
    sizes = {
        FEW: {"images": 100},
        "1,000": {"images": 1000},
        f"{lab.scale.images:,}, as in the other experiments": {},
        ENDLESS: {"images": None, "no_cache": True},
    }

    def of_seed(seed: int) -> dict[str, dict[str, float]]:
        rows, sheet = {}, {"hints": [sample.hint for sample in lab.circles]}
        for size, settings in sizes.items():
            run = lab.train(seed, **settings)
            net = lab.load(run)
            sheet[size] = lab.draw_circles(net)
            prompted = lab.draw_circles(net, [sample.caption for sample in lab.circles])
            rows[size] = {
                "iou": circles_measured(sheet[size], lab.circles)["iou"],
                **{f"prompted {name}": value for name, value in circles_measured(prompted, lab.circles).items()},
                "validation loss": last_loss(run.log()),
            }
        if seed == 0:
            save_sheet(lab, "data_size", sheet)
        return rows

    return {"seen": lab.scale.steps * BATCH, "sizes": lab.over_seeds(of_seed)}


def tables(numbers: dict) -> list[str]:
    head = ["pictures", "IoU without prompt", "IoU with it", "both colours right with it", "validation loss at the end"]
    rows = [
        [size, *(shown(row[name]) for name in MEASURES), shown(row["validation loss"], digits=4)]
        for size, row in numbers["sizes"].items()
    ]
    seen = f"Each training looks at {numbers['seen']:,} pictures: of a larger set it sees a part, of a smaller one all "
    return [f"{seen}again and again.", table(head, rows)]


def verdict(numbers: dict) -> Verdict:
    least, endless = (numbers["sizes"][size]["iou"] for size in (FEW, ENDLESS))
    collapsed, grows = sum(least) < 0.5 * sum(endless), above(endless, least)
    words = (
        f"training {'collapses' if collapsed else 'does not collapse'} with {FEW} pictures (IoU {shown(least)}), and "
        f"with endless ones it {IS[grows]} better ({shown(endless)})"
    )
    return judged(endless, all_of(not collapsed, grows), words)


EXPERIMENT = Experiment(
    title="Size of the data set (Figure 10, section 4.4)",
    claim="Training does not collapse with 1,000 images, and the results get better with more.",
    how="Circles, at equal steps, measured on hints that no training has seen. Two colours, a place and a radius are "
    "all that a picture of this world can differ in, so few show most of it: a thousand photographs do not. A training "
    "sees 1,000 pictures too rarely to learn them by heart: a collapse, to less than half of the IoU, is looked for "
    "with 100. Of 10,000, as of endless ones, none would be seen twice. The validation "
    "loss is not judged.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
