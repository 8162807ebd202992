"""The first tab: a drawing or a pose becomes a picture with the small models, seen while it is made."""

from collections.abc import Iterator

import gradio as gr

from controlnet.checkpoint import TINY_CONTROLS

from . import sketch
from .results import IN_THE_STUDIO, cancelling, in_sentences, results, seen, shown_as_text
from .studio import BY_HINT, Studio


def draw_tab(studio: Studio) -> None:
    with gr.Row():
        with gr.Column():
            canvas = gr.HTML(**sketch.parts())
            prompt = gr.Textbox("", label="prompt", placeholder="red circle with blue background", elem_id="prompt")
            with gr.Row():
                make = gr.Button("make", variant="primary", min_width=90)
                again = gr.Button("another seed", min_width=90)
                cancel = gr.Button("cancel", min_width=90)
            with gr.Accordion("more", open=False):
                with gr.Row():
                    control = gr.Dropdown([BY_HINT, *TINY_CONTROLS.values()], value=BY_HINT, label="control")
                    seed = gr.Number(0, label="seed", precision=0)
                steps = gr.Slider(1, 50, 20, step=1, label="steps")
                strength = gr.Slider(0, 2, 1, label="strength of the control")
                cfg = gr.Slider(0, 10, 2.5, label="guidance")
        with gr.Column():
            shown = _, gallery, notes = results("picture", 380)
            dropped = gr.File(label="a picture made here fills the form", file_types=[".png"], height=120)
    form = [canvas, prompt, control, seed, steps, strength, cfg]

    def draw(sent, prompt, control, seed, steps, strength, cfg, made, request: gr.Request) -> Iterator[tuple]:
        given = dict(prompt=prompt, seed=int(seed or 0), steps=int(steps), cfg=cfg, control_scale=[strength])
        with in_sentences():
            hint = studio.keep(sketch.hint_of(sent))
        given |= dict(hint=[hint], control=[] if control == BY_HINT else [control])
        yield from seen(studio, given, made, request.session_hash)

    drawing = dict(inputs=[*form, gallery], outputs=shown, **IN_THE_STUDIO)
    make.click(draw, **drawing)
    again.click(lambda seed: int(seed or 0) + 1, seed, seed).then(draw, **drawing)
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
