"""What both tabs for pictures have in common: where pictures appear while they are made, and how errors are said."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

import gradio as gr

from .studio import Studio, sentence_of

SECONDS = 20  # for which a sentence about what went wrong stays
# Of an event that makes pictures: visitors wait in the studio, which makes one at a time, and not in gradio's queue.
IN_THE_STUDIO = {"concurrency_limit": None}


def results(studio: Studio, name: str, height: int) -> list:
    """Where pictures appear: the newest, those made before, and what is to be said."""

    def looked_at(event: gr.SelectData) -> str:
        return str(studio.folder / Path(event.value["image"]["path"]).name)

    shown = dict(interactive=False, format="png")
    buttons = ["download", "fullscreen"]
    picture = gr.Image(label="picture", type="filepath", height=height, buttons=buttons, elem_id=name, **shown)
    notes = gr.HTML(elem_id=f"{name}-notes")
    small = dict(show_label=False, columns=5, fit_columns=False, allow_preview=False, buttons=[])
    gallery = gr.Gallery(studio.made, elem_id=f"{name}-before", **small, **shown)
    gallery.select(looked_at, None, picture, show_progress="hidden")
    return [picture, gallery, notes]


def seen(studio: Studio, form: Callable[[], dict], visitor: str) -> Iterator[tuple]:
    """What is told while pictures are made of what a form gives -> what `results` shows."""
    notes, step = [], "waiting, loading ..."
    yield gr.skip(), gr.skip(), step
    try:
        given = form()
    except Exception as error:
        yield gr.skip(), gr.skip(), shown_as_text([sentence_of(error)])
        return
    for told in studio.make(given, visitor):
        notes += [told.note] if told.note else []
        if told.picture:
            step = ""
            yield told.picture, studio.made(), shown_as_text(notes)
        else:
            step = f"step {told.step} of {told.steps}" if told.steps else step
            yield told.preview or gr.skip(), gr.skip(), shown_as_text([*notes, step])
    yield gr.skip(), gr.skip(), shown_as_text(notes)


def cancelling(studio: Studio) -> Callable:
    """What a button calls. (Gradio's own way to cancel may leave a page in which no other picture can be asked for.)"""

    def cancel(request: gr.Request) -> None:
        studio.cancel(request.session_hash)

    return cancel


def shown_as_text(lines: list[str]) -> str:
    return "<br>".join(map(escape, filter(None, lines)))


@contextmanager
def in_sentences() -> Iterator[None]:
    """What goes wrong is said in the page, in the sentence that a command line would say. Also a decorator."""
    try:
        yield
    except Exception as error:
        raise gr.Error(sentence_of(error), duration=SECONDS, print_exception=False) from error
