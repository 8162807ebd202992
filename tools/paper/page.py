"""OUT/NAME.json, and the page that is drawn from these files."""

import json
from importlib import import_module
from pathlib import Path

from controlnet.common.files import read_json
from controlnet.common.program import note
from controlnet.training.charts import chart
from controlnet.training.run_state import write_text

from . import NAMES
from .experiment import Experiment
from .lab import LR, OPTIMIZER, WARMUP, Lab
from .statistics import LEAST, Verdict

EXPERIMENTS: dict[str, Experiment] = {name: import_module(f"{__package__}.{name}").EXPERIMENT for name in NAMES}
ANSWERS = {True: "yes", False: "**no**", None: "cannot be said"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="400" style="background:white" '

HEAD = f"""# The paper in miniature

The experiments of *Adding Conditional Control to Text-to-Image Diffusion Models* (arXiv 2302.05543) on the small base
of this project, whose synthetic pictures are known exactly. `python -m tools.paper` makes this page; the numbers are in
the `.json` files beside it. Values are means and standard deviations over the seeds of the training. Samples are the
first six of those that are held out, with the seeds 0 to 5: none is picked. A value of this world is not one of
photographs: what can be compared is which is better, and what happens when.

One value is above another if their difference is larger than its standard deviation and than {LEAST:g}. It is not above
if difference and deviation together are below {LEAST:g}. Otherwise, and always with one seed, it cannot be said.

Where nothing else is said, trainings are by {OPTIMIZER.capitalize()} at a constant rate of {LR:g}, after {WARMUP} steps
of warm-up; the authors used AdamW at 1e-5 for SD.
"""


def measured(name: str, lab: Lab) -> None:
    """Writes OUT/NAME.json, unless it is there and was made with the same options."""
    file, experiment = lab.out / f"{name}.json", EXPERIMENTS[name]
    settings = lab.settings | experiment.settings(lab)
    if file.exists() and read_json(file)["settings"] == settings:
        note(f"{file} is there: it is drawn again (remove it to measure again)")
        return
    note(f"{name}: {experiment.title}")
    numbers = experiment.measure(lab)
    write_text(file, json.dumps({"settings": settings, "numbers": numbers}, indent=1) + "\n")


def draw_page(out: Path) -> None:
    """OUT/README.md and its charts, of all experiments that have numbers there."""
    found = {name: read_json(out / f"{name}.json") for name in EXPERIMENTS if (out / f"{name}.json").exists()}
    lines = ["| experiment | seeds | steps | does it agree with the paper? | |", "|---|---:|---:|---|---|"]
    sections = []
    for name, file in found.items():
        title, settings = EXPERIMENTS[name].title, file["settings"]
        agrees, why = verdict = EXPERIMENTS[name].verdict(file["numbers"])
        row = [f"[{title}](#{anchor(title)})", settings["seeds"], settings["steps"], ANSWERS[agrees], why]
        lines.append(f"| {' | '.join(map(str, row))} |")
        sections.append(section(out, name, file, verdict))
    write_text(out / "README.md", "\n".join([HEAD, *lines, *sections]))


def section(out: Path, name: str, file: dict, verdict: Verdict) -> str:
    experiment, numbers = EXPERIMENTS[name], file["numbers"]
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
    parts.append(f"**Does it agree?** {ANSWERS[verdict.agrees]}: {verdict.why}.")
    settings = ", ".join(f"{key} {value}" for key, value in file["settings"].items())
    return "\n\n".join([*parts, f"<sub>`python -m tools.paper {name}`: {settings}</sub>", ""])


def anchor(title: str) -> str:
    """As GitHub names it."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")
