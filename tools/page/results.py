"""What both tabs for pictures have in common: where pictures appear while they are made, and how errors are said."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape

import gradio as gr

from .studio import Studio, sentence_of

# Of an event that makes pictures: visitors wait in the studio, which makes one at a time, and not in gradio's queue.
IN_THE_STUDIO = {"concurrency_limit": None}


def results(name: str, height: int) -> list:
    """Where pictures appear: the newest, those made before, and what is to be said."""
    picture = gr.Image(
        label="picture",
        interactive=False,
        format="png",
        type="filepath",
        height=height,
        buttons=["download", "fullscreen"],
        elem_id=name,
    )
    notes = gr.HTML(elem_id=f"{name}-notes")
    gallery = gr.Gallery(
        label="made before",
        interactive=False,
        columns=6,
        height=130,
        format="png",
        fit_columns=False,
        buttons=["download"],
    )
    return [picture, gallery, notes]


def seen(studio: Studio, given: dict, made: list | None, visitor: str) -> Iterator[tuple]:
    """What is told while pictures are made -> what `results` shows. `made` is the gallery as it is."""
    notes, step = [], "waiting, loading ..."
    yield gr.skip(), gr.skip(), step
    for told in studio.make(given, visitor):
        notes += [told.note] if told.note else []
        if told.picture:
            made, step = [told.picture, *(made or [])], ""
            yield told.picture, made, shown_as_text(notes)
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
        raise gr.Error(sentence_of(error), duration=None, print_exception=False) from error
