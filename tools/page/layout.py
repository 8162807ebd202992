"""The page's tabs."""

from pathlib import Path

import gradio as gr

from .draw import draw_tab
from .photo import photo_tab
from .studio import Studio

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # nothing is fetched
# Pictures of the small models are enlarged to be looked at.
CSS = "#picture img, #photo-picture img { width: 100%; height: 100%; object-fit: contain; }"


def page(pictures: Path, runs: Path) -> gr.Blocks:
    studio = Studio(pictures)
    with gr.Blocks(title="ControlNet", analytics_enabled=False) as blocks:
        with gr.Tab("Draw"):
            draw_tab(studio)
        with gr.Tab("Photo"):
            photo_tab(studio)
    return blocks
