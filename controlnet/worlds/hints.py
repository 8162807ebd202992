"""Hints of the synthetic datasets, uint8 (H, W, 3), made from a picture and what is known about it."""

import numpy as np
from PIL import Image, ImageFilter

from controlnet.hints.ade20k import ADE20K
from controlnet.hints.canny import canny
from controlnet.hints.filters import as_rgb, smooth_noise

from .classes import ADE20K_CLASSES
from .world import Picture

EDGE_THRESHOLDS = (50, 100)  # of Canny: half the usual, so that a step of 26 levels of gray is an edge
FINER = 2  # scribbles are drawn larger, so that their edges are smooth


def edges(picture: Picture) -> np.ndarray:
    """The Canny edges of the image."""
    return as_rgb(canny(picture.image, *EDGE_THRESHOLDS))


def scribble(picture: Picture, rng: np.random.Generator) -> np.ndarray:
    """White strokes on black along the edges of the parts, as a quick hand draws them: thick, wobbling, with gaps.
    Smooth noise says how far each stroke is off, and where one is missing."""
    size = len(picture.parts)
    side, wobble, gaps = FINER * size, rng.uniform(0.01, 0.025), rng.uniform(0.16, 0.34)
    off = np.stack([smooth_noise(rng, side, side, cell=side // 6) for _ in "yx"]) - 0.5  # (2, side, side)
    places = np.mgrid[:side, :side] / FINER + 2 * wobble * size * off
    rows, columns = places.astype(int).clip(0, size - 1)
    parts = picture.parts[rows, columns]
    lines = np.zeros((side, side), bool)
    lines[1:] |= parts[1:] != parts[:-1]
    lines[:, 1:] |= parts[:, 1:] != parts[:, :-1]
    lines &= smooth_noise(rng, side, side, cell=side // 10) > gaps
    # Odd, about 3 of 128 pixels wide. A filter of one pixel would crash Python, with Pillow 12.
    brush = 2 * max(1, round(side * rng.uniform(0.007, 0.012))) + 1
    strokes = Image.fromarray(lines.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(brush))
    return as_rgb(np.asarray(strokes.reduce(FINER)))


def segmentation(picture: Picture) -> np.ndarray:
    """The classes of a scene in the colours of ADE20K."""
    return ADE20K[np.array(list(ADE20K_CLASSES.values()))][picture.truth.classes]


def depth(picture: Picture) -> np.ndarray:
    """The depth of a scene, near is white."""
    return as_rgb(np.rint(255 * (1 - picture.truth.depth)).astype(np.uint8))
