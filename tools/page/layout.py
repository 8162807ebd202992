"""The page's tabs."""

from pathlib import Path

import gradio as gr

from .draw import draw_tab
from .studio import Studio

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # nothing is fetched


def page(pictures: Path, runs: Path) -> gr.Blocks:
    studio = Studio(pictures)
    with gr.Blocks(title="ControlNet", analytics_enabled=False) as blocks:
        with gr.Tab("Draw"):
            draw_tab(studio)
    return blocks
