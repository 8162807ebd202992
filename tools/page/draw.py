"""The first tab: a drawing or a pose becomes a picture with the small models, seen while it is made."""

from collections.abc import Iterator

import gradio as gr

from controlnet.checkpoint import TINY_CONTROLS

from . import sketch
from .results import IN_THE_STUDIO, cancelling, in_sentences, results, seen, shown_as_text
from .studio import BY_HINT, Studio

KNOWN = 'what is to be seen, like "red circle with blue background": the small models know circles, people, some things'


def draw_tab(studio: Studio) -> None:
    with gr.Row():
        with gr.Column():
            canvas = gr.HTML(**sketch.parts())
            prompt = gr.Textbox("", label="prompt", info=KNOWN, elem_id="prompt")
            with gr.Row():
                make = gr.Button("make", variant="primary", min_width=90)
                another = gr.Button("another", min_width=90)
                cancel = gr.Button("cancel", min_width=90)
            with gr.Accordion("more", open=False):
                with gr.Row():
                    control = gr.Dropdown([BY_HINT, *TINY_CONTROLS.values()], value=BY_HINT, label="ControlNet")
                    seed = gr.Number(0, label="seed", precision=0)
                steps = gr.Slider(1, 50, 20, step=1, label="steps")
                strength = gr.Slider(0, 2, 1, label="strength of the control")
                cfg = gr.Slider(0, 10, 2.5, label="guidance")
            dropped = gr.UploadButton("fill the form from a picture that was made here", file_types=[".png"], size="sm")
        with gr.Column():
            shown = picture, _, notes = results(studio, "picture", 380)
    form = [canvas, prompt, control, seed, steps, strength, cfg]

    def draw(values: dict, request: gr.Request) -> Iterator[tuple]:
        def given() -> dict:
            drawn = dict(hint=[studio.keep(sketch.hint_of(values[canvas]))], control_scale=[values[strength]])
            drawn |= dict(control=[] if values[control] == BY_HINT else [values[control]], prompt=values[prompt])
            return drawn | dict(seed=int(values[seed] or 0), steps=int(values[steps]), cfg=values[cfg])

        yield from seen(studio, given, request.session_hash)

    def draw_another(values: dict, request: gr.Request) -> Iterator[tuple]:
        values[seed] = int(values[seed] or 0) + 1
        for now in draw(values, request):
            yield values[seed], *now

    gr.on([make.click, prompt.submit], draw, {*form}, shown, show_progress_on=picture, **IN_THE_STUDIO)
    another.click(draw_another, {*form}, [seed, *shown], show_progress_on=picture, **IN_THE_STUDIO)
    cancel.click(cancelling(studio))
    dropped.upload(lambda file: filled(studio, file), dropped, [*form, notes])


@in_sentences()
def filled(studio: Studio, picture: str) -> tuple:
    """The form with what a picture was made from, and what is left out of that."""
    options, left_out = studio.options_of(picture)
    named = options.control[0] if options.control else None
    return (
        sketch.sent_back(options) or gr.skip(),
        options.prompt,
        named if named in TINY_CONTROLS.values() else BY_HINT,
        options.seed,
        options.steps,
        options.control_scale[0] if options.control_scale else 1,
        gr.skip() if options.cfg is None else options.cfg,
        shown_as_text([left_out]),
    )
