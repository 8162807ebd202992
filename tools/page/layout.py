"""The page's tabs."""

from pathlib import Path

import gradio as gr

from .draw import draw_tab
from .files import files_tab
from .photo import photo_tab
from .runs import runs_tab
from .studio import Studio
from .trainings import Trainings

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # nothing is fetched
THEME.set(block_info_text_color="*neutral_500", input_placeholder_color="*neutral_500")
CSS = """
#picture img, #photo-picture img { width: 100%; height: 100%; object-fit: contain; }  /* the small models' are small */
#picture-before:not(:has(img)), #photo-picture-before:not(:has(img)) { display: none; }  /* nothing was made yet */
#charts .prose { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 1em; }
#charts figure { margin: 0; font-size: 12px; }
#output textarea, #command textarea, #facts textarea { font-family: ui-monospace, monospace; font-size: 12px; }
"""


ABOUT = {
    "Draw": "Draw a circle or the outlines of things, or drag a pose, and press make: the picture follows your lines.",
    "Photo": "Drop a photograph. Make a hint of it, below, which the new picture follows; or begin from the photograph "
    "itself, and paint over what is to be made anew.",
    "Runs": "A training teaches a ControlNet to follow hints: at some step its pictures begin to follow, and it can be "
    "stopped. It goes on when this page is closed.",
    "Files": "What a checkpoint is, and what it goes with.",
}


def page(pictures: Path, runs: Path) -> gr.Blocks:
    studio, trainings = Studio(pictures), Trainings(runs)
    with gr.Blocks(title="ControlNet") as blocks:
        for name, owner, fill in (
            ("Draw", studio, draw_tab),
            ("Photo", studio, photo_tab),
            ("Runs", trainings, runs_tab),
            ("Files", trainings, files_tab),
        ):
            with gr.Tab(name):
                gr.Markdown(ABOUT[name])
                fill(owner)
    return blocks
