"""A contact sheet: a few pairs as a training sees them, resized and cropped, with their captions."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from einops import rearrange
from PIL import Image

from controlnet.common.images import fitted
from controlnet.hints.hint_image import in_rgb
from controlnet.worlds import Sample

from .pairs import BadSample
from .previews import text_image
from .sources import Source

COLUMNS, SIDE, GAP = 4, 224, 8  # pixels


def few_of(source: Source, count: int) -> list[Sample]:
    """Good ones from all over a source, in its order."""
    step, found = max(1, len(source) // count), {}
    for index in sorted(range(len(source)), key=lambda i: (i % step, i)):
        with suppress(BadSample):
            found[index] = source.sample(index)
        if len(found) == count:
            break
    return [found[index] for index in sorted(found)]


def contact_sheet(samples: Sequence[Sample]) -> Image.Image:
    """Image beside hint, and the caption below, four pairs a row."""
    cells = [np.pad(cell(sample), ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for sample in samples]
    columns = min(COLUMNS, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)  # to fill the last row
    return Image.fromarray(rearrange(cells, "(row column) h w rgb -> (row h) (column w) rgb", column=columns))


def cell(sample: Sample) -> np.ndarray:
    """(H, W, 3), of the same size for all; around an image that is not square it is gray."""
    both = (Image.fromarray(array) for array in (sample.image, in_rgb(sample.hint)))
    pair = np.hstack([np.asarray(fitted(image, (SIDE, SIDE), "pad", (128, 128, 128))) for image in both])
    return np.vstack([pair, text_image([sample.caption], (SIDE // 4, 2 * SIDE))])
