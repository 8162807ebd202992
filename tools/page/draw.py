"""The first tab: a drawing or a pose becomes a picture with the small models, seen while it is made."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

from controlnet.checkpoint import TINY_CONTROLS

from .sketch import READ, save_hint, sketch
from .studio import Studio, options_of

ANY = "by the hint"
QUEUE = dict(concurrency_limit=1, concurrency_id="studio")  # one picture at a time, whoever asks


def draw_tab(studio: Studio) -> None:
    with gr.Row():
        with gr.Column():
            sketch()
            sent = gr.Textbox(visible=False)
            prompt = gr.Textbox(label="prompt", placeholder="red circle with blue background", elem_id="prompt")
            with gr.Row():
                control = gr.Dropdown([ANY, *TINY_CONTROLS], value=ANY, label="control")
                seed = gr.Number(0, label="seed", precision=0)
            with gr.Accordion("more", open=False):
                steps = gr.Slider(1, 50, 20, step=1, label="steps")
                strength = gr.Slider(0, 2, 1, label="strength of the control")
                cfg = gr.Slider(0, 10, 2.5, label="guidance")
            with gr.Row():
                make, again = gr.Button("make", variant="primary"), gr.Button("with another seed")
                cancel = gr.Button("cancel")
        with gr.Column():
            picture, gallery, notes, made = results()
            dropped = gr.File(label="a picture made here fills the form", file_types=[".png"], height=80)
    asked = [sent, prompt, control, seed, steps, strength, cfg]
    shown = [picture, gallery, notes, made]

    def draw(sent, prompt, control, seed, steps, strength, cfg, made):
        with TemporaryDirectory() as folder:
            hint = Path(folder) / "drawing.png"
            given = dict(prompt=prompt or "", seed=int(seed), steps=int(steps), cfg=cfg, control_scale=[strength])
            given |= dict(hint=[str(hint)], control=[] if control == ANY else [control])
            try:
                save_hint(sent, hint)
            except ValueError as error:
                yield gr.skip(), gr.skip(), str(error), made
                return
            yield from seen(studio, given, made)

    begun = make.click(draw, [*asked, made], shown, js=READ, **QUEUE)
    more = again.click(lambda seed: int(seed) + 1, seed, seed).then(draw, [*asked, made], shown, js=READ, **QUEUE)
    cancel.click(None, cancels=[begun, more])
    dropped.upload(fill, dropped, [prompt, seed, steps, cfg, notes])


def results() -> tuple[gr.Image, gr.Gallery, gr.Markdown, gr.State]:
    """Where pictures appear: the newest, those made before, what is to be said, and the files of all."""
    picture = gr.Image(label="picture", interactive=False, format="png", type="filepath", elem_id="picture")
    notes = gr.Markdown(elem_id="notes")
    gallery = gr.Gallery(label="made before", columns=6, height=140, format="png", object_fit="contain")
    return picture, gallery, notes, gr.State([])


def seen(studio: Studio, given: dict, made: list[str]) -> Iterator[tuple]:
    """What is told while pictures are made -> what `results` shows."""
    notes = ""
    for told in studio.make(given):
        notes += f"{told.note}\n\n" if told.note else ""
        if told.picture:
            made = [str(told.picture), *made]
        yield told.picture or told.preview or gr.skip(), made if told.picture else gr.skip(), notes, made


def fill(file: str) -> tuple:
    try:
        options = options_of(file)
    except ValueError as error:
        return gr.skip(), gr.skip(), gr.skip(), gr.skip(), str(error)
    cfg = gr.skip() if options.cfg is None else options.cfg
    return options.prompt, options.seed, options.steps, cfg, "the form has the options of that picture"
