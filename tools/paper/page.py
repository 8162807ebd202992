"""OUT/NAME.json, and the page that is drawn from these files."""

import json
from pathlib import Path

from controlnet.common.files import read_json
from controlnet.common.program import note
from controlnet.training.run_state import write_text
from tools.page.charts import chart

from . import (
    architectures,
    composition,
    convergence,
    copies,
    cost,
    data_size,
    guidance,
    segmentation,
    transfer,
)
from .experiment import Experiment
from .lab import Lab

EXPERIMENTS: dict[str, Experiment] = {
    "convergence": convergence.EXPERIMENT,
    "architectures": architectures.EXPERIMENT,
    "copies": copies.EXPERIMENT,
    "data_size": data_size.EXPERIMENT,
    "guidance": guidance.EXPERIMENT,
    "composition": composition.EXPERIMENT,
    "cost": cost.EXPERIMENT,
    "transfer": transfer.EXPERIMENT,
    "segmentation": segmentation.EXPERIMENT,
}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="400" style="background:white" '

HEAD = """# The paper in miniature

The experiments of *Adding Conditional Control to Text-to-Image Diffusion Models* (arXiv 2302.05543) on the small base
of this project, whose synthetic pictures are known exactly. `python -m tools.paper` makes this page; the numbers are in
the `.json` files beside it. Values are means and standard deviations over the seeds of the training. Samples are the
first six of those that are held out, with the seeds 0 to 5: none is picked. A value of this world is not one of
photographs: what can be compared is which is better, and what happens when.
"""


def measured(name: str, lab: Lab) -> None:
    """Writes OUT/NAME.json, unless it is there and was made with the same options."""
    file = lab.out / f"{name}.json"
    if file.exists() and read_json(file)["settings"] == lab.settings:
        note(f"{file} is there: it is drawn again (remove it to measure again)")
        return
    note(f"{name}: {EXPERIMENTS[name].title}")
    numbers = EXPERIMENTS[name].measure(lab)
    write_text(file, json.dumps({"settings": lab.settings, "numbers": numbers}, indent=1) + "\n")


def draw_page(out: Path) -> None:
    """OUT/README.md and its charts, of all experiments that have numbers there."""
    found = {name: read_json(out / f"{name}.json") for name in EXPERIMENTS if (out / f"{name}.json").exists()}
    lines, sections = ["| experiment | does it agree with the paper? | |", "|---|---|---|"], []
    for name, file in found.items():
        agrees, why = EXPERIMENTS[name].verdict(file["numbers"])
        title = EXPERIMENTS[name].title
        lines.append(f"| [{title}](#{anchor(title)}) | {answer(agrees)} | {why} |")
        sections.append(section(out, name, file))
    write_text(out / "README.md", "\n".join([HEAD, *lines, *sections]))


def section(out: Path, name: str, file: dict) -> str:
    experiment, numbers = EXPERIMENTS[name], file["numbers"]
    agrees, why = experiment.verdict(numbers)
    parts = [f"\n## {experiment.title}", f"**The paper:** {experiment.claim}", f"**Here:** {experiment.how}"]
    parts += experiment.tables(numbers)
    charts = []
    for i, (title, curves) in enumerate(experiment.charts(numbers).items()):
        picture = f"{name}-{i}.svg"
        write_text(out / picture, chart(title, curves).replace("<svg ", SVG, 1))
        charts.append(f"![{title}]({picture})")
    parts += [" ".join(charts)] if charts else []
    if (out / f"{name}.jpg").exists():
        parts.append(f"![The first six samples]({name}.jpg)")
    parts.append(f"**Does it agree?** {answer(agrees)}: {why}.")
    settings = ", ".join(f"{key} {value}" for key, value in file["settings"].items())
    return "\n\n".join([*parts, f"<sub>`python -m tools.paper {name}`: {settings}</sub>", ""])


def answer(agrees: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "cannot be said"}[agrees]


def anchor(title: str) -> str:
    """As GitHub names it."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")
