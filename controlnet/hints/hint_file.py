"""A hint from its file, in the channels that a ControlNet reads: the same for training and for `infer.py`.

Hints are uint8 arrays (H, W, C).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from controlnet.common.files import read_arrays
from controlnet.common.image_files import check_depth, ground_of_hint, in_8_bits, open_image, to_rgb

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels


def read_hint(path: str | Path, channels: int = 3) -> np.ndarray:
    """(H, W, `channels`) from an image or a .npy array, as `with_channels` says. Raises ValueError."""
    return with_channels(open_hint(path), channels, str(path))


def open_hint(path: str | Path) -> Image.Image | np.ndarray:
    """An upright image of any mode, or uint8 (H, W, C) from a .npy file with another number of channels than 1, 3 or 4.

    Arrays in files are (H, W) or (H, W, C), uint8 or floats in [0, 1]. Raises ValueError for others, for a file that
    cannot be read, and for an image of 32 bits a channel.
    """
    if Path(path).suffix.lower() != ".npy":
        image = open_image(path)
        check_depth(image, path)
        return image
    (array,) = read_arrays(path).values()
    if array.dtype.kind == "f" and array.size:
        if not (array.min() >= 0 and array.max() <= 1):  # false for NaN
            raise ValueError(f'"{path}" has values outside [0, 1], expected floats within it, or uint8')
        array = np.rint(255 * array).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        raise ValueError(f'"{path}" is {array.dtype} {array.shape}, expected uint8 or floats (H, W) or (H, W, C)')
    array = array.reshape(*array.shape[:2], -1)
    if array.shape[2] not in IMAGE_MODES:
        return array
    return Image.fromarray(array.squeeze(axis=2) if array.shape[2] == 1 else array)


def with_channels(stored: Image.Image | np.ndarray, channels: int, name: str) -> np.ndarray:
    """(H, W, `channels`) of what `open_hint` returns for the file `name`.

    Of an image, 3 channels are RGB with `ground_of_hint` behind transparent parts, 1 is that in gray, and 4 are red,
    green, blue and opacity as they are stored. Raises ValueError if it does not have so many.
    """
    if isinstance(stored, Image.Image) and channels in IMAGE_MODES:
        image = in_8_bits(stored) if channels == 4 else to_rgb(stored, ground_of_hint)
        return np.array(image.convert(IMAGE_MODES[channels])).reshape(*stored.size[::-1], channels)
    found = len(stored.getbands()) if isinstance(stored, Image.Image) else stored.shape[2]
    if isinstance(stored, Image.Image) or found != channels:
        raise ValueError(
            f'"{name}" has {found} channels, and the ControlNet reads {channels}: an image has 1, 3 or 4, a .npy array '
            "(H, W, C) any number"
        )
    return stored


def is_label_map(hint: np.ndarray) -> bool:
    """Whether it holds the numbers 0, 1, 2 ... of classes, which as grays look black: few and small values, in patches.
    (255 often means no class.)"""
    if hint.shape[2] not in (1, 3) or (hint != hint[..., :1]).any():
        return False
    gray = hint[..., 0]
    labels = np.setdiff1d(gray, [255])
    in_patches = gray.shape[1] > 1 and (gray[:, 1:] == gray[:, :-1]).mean() > 0.8
    return bool(len(labels) <= 32 and labels.any() and labels.max() < 64 and len(np.unique(gray)) > 1 and in_patches)
