"""The fourth tab: what a checkpoint is, and what it goes with."""

from pathlib import Path

import gradio as gr

from tools.describe import facts_text
from tools.description import facts_of

from .models import checkpoints
from .results import in_sentences
from .trainings import Trainings


def files_tab(trainings: Trainings) -> None:
    def known() -> dict[str, Path]:
        """By the names under which they are shown."""
        trained = [trainings.run(name).control for name in trainings.names()]
        return {path.name: path for path in checkpoints()} | {str(path): path for path in trained if path.is_file()}

    with gr.Row():
        with gr.Column():
            names = list(known())
            chosen = gr.Dropdown(names, value=None, label="in weights/ and of the trainings", elem_id="checkpoint")
            dropped = gr.File(label="any other file", height=140, elem_id="dropped")
        with gr.Column():
            facts = gr.Textbox(label="what it is", lines=4, max_lines=40, elem_id="facts")

    @in_sentences()
    def describe(name: str | None) -> str:
        if name not in known():
            raise ValueError(f'there is no checkpoint "{name}" here: choose one of the list, or drop it')
        return facts_text(facts_of(str(known()[name]), values=False, keys=False))

    @in_sentences()
    def describe_dropped(file: str) -> str:
        return facts_text({**facts_of(file, values=False, keys=False), "file": Path(file).name})

    chosen.input(describe, chosen, facts)
    dropped.upload(describe_dropped, dropped, facts)
    chosen.focus(lambda: gr.Dropdown(list(known())), None, chosen, show_progress="hidden")
