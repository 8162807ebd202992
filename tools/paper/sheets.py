"""Sheets of samples: the first six, none picked, a row for each condition under the hints."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from controlnet.training.previews import text_image
from ldm.checkpoints.files import new_file

from .lab import Lab

SHOWN = 6
SIDE, WORDS = 80, 110  # pixels of a picture, and of the label before its row


def save_sheet(lab: Lab, name: str, rows: dict[str, Sequence[np.ndarray]]) -> None:
    """OUT/NAME.jpg, with the first images of each row."""
    lines = []
    for label, images in rows.items():
        shown = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE))) for image in images[:SHOWN]]
        lines.append(np.hstack([text_image([label], (SIDE, WORDS)), *shown]))
    with new_file(lab.out / f"{name}.jpg") as temporary:
        Image.fromarray(np.vstack(lines)).save(temporary, "JPEG", quality=80)
