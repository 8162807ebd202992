"""The second tab: a photograph is begun from, or becomes hints for ControlNets, which a brush corrects."""

from collections.abc import Iterator
from itertools import chain

import gradio as gr

from controlnet.hints import DETECTORS, options_of, options_text

from .editors import FROM_NOISE, FROM_PHOTO, PAINTED, background, begun_from, detected, dropped, hints_of
from .models import named
from .results import IN_THE_STUDIO, cancelling, in_sentences, results, seen
from .studio import BY_HINT, Studio

CONTROLS = 3
HEIGHT = 340  # pixels of what is looked at
RED, WHITE, BLACK = "#ff3b30", "#ffffff", "#000000"


def photo_tab(studio: Studio) -> None:
    with gr.Row():
        with gr.Column():
            photo = editor("photograph; paint what is to be made anew", RED, "photo")
            prompt = gr.Textbox("", label="prompt: what is to be seen", elem_id="photo-prompt")
            with gr.Row():
                make = gr.Button("make", variant="primary", min_width=90)
                cancel = gr.Button("cancel", min_width=90)
            with gr.Row():
                base = gr.Dropdown(named("base"), value="tiny", label="base", min_width=120)
                start = gr.Dropdown([FROM_NOISE, FROM_PHOTO, PAINTED], label="begin from", min_width=120)
            with gr.Accordion("more", open=False):
                strength = gr.Slider(0, 1, 0.75, label="how much of the photograph is made anew")
                around = gr.Checkbox(label="make what is painted alone, and put it back into the photograph")
                negative = gr.Textbox("", label="what it should not show")
                with gr.Row():
                    size = gr.Textbox("", label="size", placeholder="512x768", min_width=90)
                    seed = gr.Number(0, label="seed", precision=0, min_width=90)
                    cfg = gr.Number(None, label="guidance", placeholder="2.5 for tiny, else 7.5", min_width=90)
                steps = gr.Slider(1, 100, 20, step=1, label="steps")
        with gr.Column():
            shown = picture, *_ = results(studio, "photo-picture", HEIGHT)
    with gr.Tabs():
        acting = [control_part(i, studio, photo, base, size) for i in range(CONTROLS)]
    begun = [photo, start, strength, around]

    def draw(values: dict, request: gr.Request) -> Iterator[tuple]:
        def form() -> dict:
            given = dict(prompt=values[prompt] or "", negative=values[negative] or "", base=values[base])
            given |= dict(size=values[size] or None, cfg=values[cfg] or None)
            given |= dict(seed=int(values[seed] or 0), steps=int(values[steps]))
            given |= begun_from(studio, *(values[one] for one in begun))
            given |= hints_of(studio, [[values[one] for one in part] for part in acting])
            if not given.keys() & {"init", "hint"} and dropped(values[photo]):
                raise ValueError("the photograph is not used yet: make a hint of it, below, or begin from it")
            return given

        yield from seen(studio, form, request.session_hash)

    fields = {prompt, negative, base, size, cfg, seed, steps, *begun, *chain(*acting)}
    gr.on([make.click, prompt.submit], draw, fields, shown, show_progress_on=picture, **IN_THE_STUDIO)
    cancel.click(cancelling(studio))


def control_part(i: int, studio: Studio, photo: gr.ImageEditor, base: gr.Dropdown, size: gr.Textbox) -> list:
    """The form of one control -> hint, name, strength, start, end, and where it acts."""
    with gr.Tab(f"control {i + 1}"), gr.Row():
        with gr.Column():
            with gr.Row():
                detector = gr.Dropdown(list(DETECTORS), value="canny", label="detector", min_width=120)
                options = gr.Textbox("", label="its options", placeholder=options_text(options_of("canny")), lines=1)
            about = gr.Markdown(DETECTORS["canny"].about)
            with gr.Accordion("not of the photograph, but of a file", open=False):
                file = gr.File(label="an image, a pose (.json), a map of depth, normals or classes", height=120)
            detect = gr.Button("make the hint", elem_id=f"detect-{i + 1}")
            with gr.Row():
                name = gr.Dropdown([BY_HINT, *named("ControlNet")], value=BY_HINT, label="ControlNet", min_width=120)
                scale = gr.Slider(0, 2, 1, label="strength", min_width=120)
            with gr.Row():
                first = gr.Slider(0, 1, 0, label="from", info="part of the steps", min_width=120)
                last = gr.Slider(0, 1, 1, label="to", info="part of the steps", min_width=120)
        with gr.Column():
            hint = editor("hint; correct it with the brush", WHITE, f"hint-{i + 1}")
            with gr.Accordion("where it acts: paint it", open=False):
                where = editor("everywhere, if nothing is painted", RED, f"where-{i + 1}")

    @in_sentences()
    def make_hint(photo, file, base, size, detector, options) -> tuple:
        source = file or studio.keep(background(photo, "there is no photograph: drop one, of up to 4096 pixels a side"))
        found = detected(source, f"{detector}:{options}".replace(" ", "").rstrip(":"), base, size)
        return found, found

    detect.click(make_hint, [photo, file, base, size, detector, options], [hint, where])
    detector.change(described, detector, [options, about])
    return [hint, name, scale, first, last, where]


def described(detector: str) -> tuple[gr.Textbox, str]:
    return gr.Textbox(placeholder=options_text(options_of(detector))), DETECTORS[detector].about


def editor(label: str, colour: str, name: str) -> gr.ImageEditor:
    """A picture to be painted on."""
    colours = [colour, BLACK] if colour == WHITE else [colour]
    brush = gr.Brush(4 if colour == WHITE else "auto", colors=colours, color_mode="fixed")
    kind = dict(type="pil", format="png", layers=False, transforms=(), sources=("upload", "clipboard"), buttons=[])
    return gr.ImageEditor(label=label, height=HEIGHT, brush=brush, elem_id=name, **kind)
