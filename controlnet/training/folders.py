"""The images and hints of pairs, read from their files.

Sizes are (height, width) in pixels. Arrays are uint8 (H, W, C).
"""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from controlnet.common.image_files import FORMATS, open_image, read_image

from .pairs import BadSample, Entry


def read_pixels(path: Path) -> np.ndarray:
    """(H, W, 3). Raises BadSample."""
    try:
        return np.array(read_image(path))
    except ValueError as error:
        raise BadSample(str(error)) from error


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of an image, upright, from its header alone. Raises BadSample."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size if turned else image.size[::-1]
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise BadSample(f'"{path}" is not readable as an image ({error})') from error


def read_hint(path: Path, channels: int) -> np.ndarray:
    """A hint (H, W, `channels`): 1 is gray, 3 is RGB, 4 is RGB with the transparency; any number from a .npy array.

    An array is (H, W) or (H, W, C), uint8 or floats in [0, 1]. Raises BadSample.
    """
    if path.suffix == ".npy":
        hint = read_array(path)
    elif channels == 3:
        hint = read_pixels(path)
    else:
        try:
            hint = np.array(open_image(path).convert({1: "L", 4: "RGBA"}.get(channels, "RGB")))
        except ValueError as error:
            raise BadSample(str(error)) from error
        hint = hint.reshape(*hint.shape[:2], -1)
    if hint.shape[2] != channels:
        raise BadSample(f'"{path}" has {hint.shape[2]} channels, expected {channels} (--hint-channels)')
    return hint


def read_array(path: Path) -> np.ndarray:
    try:
        hint = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadSample(f'"{path}" is not readable as an array ({error})') from error
    if hint.dtype.kind == "f":
        if not np.isfinite(hint).all() or hint.min() < 0 or hint.max() > 1:
            raise BadSample(f'"{path}" has values outside [0, 1], expected floats within it, or uint8')
        hint = np.rint(255 * hint).astype(np.uint8)
    if hint.dtype != np.uint8 or hint.ndim not in (2, 3):
        raise BadSample(f'"{path}" is {hint.dtype} with {hint.ndim} axes, expected uint8 or floats (H, W, C)')
    return hint.reshape(*hint.shape[:2], -1)


def check_same_shape(image: np.ndarray, hint: np.ndarray, entry: Entry) -> None:
    """A hint may be smaller or larger than its image, but not of another shape: it would lie askew on it."""
    (height, width), (hint_height, hint_width) = image.shape[:2], hint.shape[:2]
    if abs(hint_width * height - hint_height * width) > 0.02 * hint_height * width:
        raise BadSample(
            f'"{entry.hint}" is {hint_width}x{hint_height} and its image "{entry.image}" {width}x{height}, '
            "expected the same shape"
        )
