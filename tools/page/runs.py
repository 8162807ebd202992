"""The third tab: trainings are watched, started and stopped."""

import gradio as gr

from controlnet.common.program import PRECISION_NAMES
from controlnet.training.report import PANELS, Curves, section

from .models import named
from .results import in_sentences
from .trainings import Trainings, datasets, log_of, shown

SECONDS = 2  # between two looks at a run
NUMBERS = {"steps": "steps", "batch size": "batch_size", "images": "images", "learning rate": "lr"}  # of train.py


def runs_tab(trainings: Trainings) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            run = gr.Dropdown(trainings.names(), value=next(iter(trainings.names()), None), label="run", elem_id="run")
            status = gr.Markdown(elem_id="status")
            with gr.Row():
                stop, resume = gr.Button("stop", min_width=90), gr.Button("go on", min_width=90)
            output = gr.Textbox(label="what it says, if it was started here", lines=4, max_lines=20, elem_id="output")
            with gr.Accordion("a new training", open=not trainings.names()) as new:
                name, started = training_form(trainings)
        with gr.Column(scale=3):
            charts = gr.HTML(elem_id="charts")
            grid = gr.Image(
                visible=False, interactive=False, height=420, buttons=["download", "fullscreen"], elem_id="grid"
            )
            which = gr.Slider(1, 2, 1, step=1, label="which grid", visible=False)
    before = gr.State()

    def look(run: str | None, which: int, before: tuple | None) -> list:
        """What is new about a run. `before` is what is shown: its name, lines of its log, grids, and which of them."""
        names = gr.Dropdown(trainings.names())
        if run not in trainings.names():
            return [names, *[gr.skip()] * 5, before]
        lines, found = log_of(trainings.run(run)), trainings.run(run).grids()
        if before is None or before[0] != run or which >= before[2]:
            which = len(found)  # who looks at the newest goes on doing so
        told = [names, trainings.status(run), trainings.output(run)]
        if before == (now := (run, len(lines), len(found), which)):
            return [*told, *[gr.skip()] * 3, before]
        curves = Curves()
        for line in lines:
            curves.add(line)
        drawn = "".join(section(panel, curves) for panel in PANELS)
        grid = found[which - 1] if found else None
        image = gr.Image(grid and str(grid), label=f"step {int(grid.stem)}" if grid else "", visible=bool(found))
        slider = gr.Slider(maximum=max(2, len(found)), value=max(1, which), visible=len(found) > 1)
        return [*told, drawn, image, slider, now]

    looking = dict(inputs=[run, which, before], outputs=[run, status, output, charts, grid, which, before])
    for event in (gr.Timer(SECONDS).tick, run.change, which.release):
        event(look, **looking, show_progress="hidden", trigger_mode="once")
    stop.click(in_sentences()(trainings.stop), run)
    resume.click(in_sentences()(lambda run: trainings.start(run, {"resume": True})), run, concurrency_id="start")
    started.success(lambda name: gr.Dropdown(trainings.names(), value=name), name, run)
    started.success(lambda: gr.Accordion(open=False), None, new)


def training_form(trainings: Trainings) -> tuple:
    """-> the name, and the event of a training that was started."""
    name = gr.Textbox("", label="name of its folder", placeholder="my-control", elem_id="name")
    with gr.Row():
        data = gr.Dropdown(datasets(), value="fill50k", label="data", min_width=120)
        base = gr.Dropdown(named("base"), value="tiny", label="base", min_width=120)
    with gr.Row():
        numbers = [gr.Textbox("", label=label, placeholder="as usual", min_width=80) for label in NUMBERS]
    with gr.Row():
        precision = gr.Dropdown(PRECISION_NAMES, value=PRECISION_NAMES[0], label="precision", min_width=120)
        checkpointing = gr.Checkbox(label="gradient checkpointing", min_width=120)
    fields = [data, base, *numbers, precision, checkpointing]

    def given(values: tuple) -> dict:
        return dict(zip(("data", "base", *NUMBERS.values(), "precision", "checkpointing"), values, strict=True))

    def typed(name: str, *values) -> str:
        return shown(trainings.arguments(name or "NAME", given(values)))

    command = gr.Textbox(label="in a terminal", lines=2, interactive=False, buttons=["copy"], elem_id="command")
    gr.on(None, typed, [name, *fields], command, show_progress="hidden", trigger_mode="always_last")
    start = gr.Button("start", variant="primary")
    return name, start.click(
        in_sentences()(lambda name, *values: trainings.start(name, given(values))),
        [name, *fields],
        concurrency_id="start",  # one at a time: no two visitors start one name
    )
