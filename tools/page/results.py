"""What both tabs for pictures have in common: where pictures appear while they are made, and how errors are said."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr

from .studio import Studio, sentence_of

AT_ONCE = dict(concurrency_limit=None)  # of visitors who ask for pictures: the studio makes one at a time


def results(name: str, height: int) -> list:
    """Where pictures appear: the newest, those made before, what is to be said; and the files of all."""
    picture = gr.Image(
        label="picture",
        interactive=False,
        format="png",
        type="filepath",
        height=height,
        buttons=["download", "fullscreen"],
        elem_id=name,
    )
    notes = gr.Markdown(elem_id=f"{name}-notes")
    gallery = gr.Gallery(
        label="made before", columns=6, height=130, format="png", fit_columns=False, buttons=["download"]
    )
    return [picture, gallery, notes, gr.State([])]


def seen(studio: Studio, given: dict, made: list[str], visitor: str) -> Iterator[tuple]:
    """What is told while pictures are made -> what `results` shows."""
    notes, step = [], "waiting, loading ..."
    yield gr.skip(), gr.skip(), step, made
    for told in studio.make(given, visitor):
        notes += [told.note] if told.note else []
        step = f"step {told.step} of {told.steps}" if told.steps else "" if told.picture else step
        made = [str(told.picture), *made] if told.picture else made
        shown = told.picture or told.preview or gr.skip()
        yield shown, made if told.picture else gr.skip(), paragraphs(notes, step), made
    yield gr.skip(), gr.skip(), paragraphs(notes), made


def cancelling(studio: Studio) -> Callable:
    """What a button calls. (Gradio's own way to cancel may leave a page in which no other picture can be asked for.)"""

    def cancel(request: gr.Request) -> None:
        studio.cancel(request.session_hash)

    return cancel


def paragraphs(notes: list[str], step: str = "") -> str:
    """As Markdown that shows every character as it is."""
    escaped = [
        "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+-.!|~$" else letter for letter in note) for note in notes
    ]
    return "\n\n".join(filter(None, [*escaped, step]))


@contextmanager
def in_sentences() -> Iterator[None]:
    """What goes wrong is said in the page, in the sentence that a command line would say. Also a decorator."""
    try:
        yield
    except Exception as error:
        raise gr.Error(sentence_of(error), duration=None, print_exception=False) from error
