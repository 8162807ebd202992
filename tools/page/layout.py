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
CSS = """
#picture img, #photo-picture img { width: 100%; height: 100%; object-fit: contain; }  /* the small models' are small */
#charts .prose { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 1em; }
#charts figure { margin: 0; font-size: 12px; }
#output textarea, #command textarea, #facts textarea { font-family: ui-monospace, monospace; font-size: 12px; }
"""


def page(pictures: Path, runs: Path) -> gr.Blocks:
    studio, trainings = Studio(pictures), Trainings(runs)
    with gr.Blocks(title="ControlNet") as blocks:
        with gr.Tab("Draw"):
            draw_tab(studio)
        with gr.Tab("Photo"):
            photo_tab(studio)
        with gr.Tab("Runs"):
            runs_tab(trainings)
        with gr.Tab("Files"):
            files_tab(trainings)
    return blocks
