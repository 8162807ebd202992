"""The images and hints of pairs, read from their files.

Sizes are (height, width) in pixels. Arrays are uint8 (H, W, C).
"""

import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from controlnet.common.image_files import FORMATS, Ground, read_image
from controlnet.common.images import Size
from controlnet.hints import hint_file

from .pairs import BadSample, Entry


def read_pixels(path: Path, ground: Ground | None = None) -> np.ndarray:
    """(H, W, 3), as `read_image` reads it. Raises BadSample."""
    try:
        return np.array(read_image(path, ground))
    except ValueError as error:
        raise BadSample(str(error)) from error


def size_of(path: Path) -> Size:
    """The size of an image when it is upright, without decoding a pixel. Raises BadSample."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            exif = Image.Image.getexif(image)  # a PNG's own would decode all pixels to look behind them
            if image.format == "PNG" and not exif:
                exif.load(last_exif(path))
            turned = image.format != "TIFF" and exif.get(ExifTags.Base.Orientation, 1) > 4  # a TIFF's size is upright
            return image.size if turned else image.size[::-1]
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise BadSample(f'"{path}" is not readable as an image ({error})') from error


def last_exif(png: Path) -> bytes:
    """The content of the last eXIf chunk, which may stand behind the pixels; b"" if there is none."""
    found = b""
    with open(png, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:  # a chunk's length and name; after what it holds come 4 bytes of checksum
            length, is_exif = int.from_bytes(head[:4]), head[4:] == b"eXIf"
            found = file.read(length) if is_exif else found
            file.seek(4 if is_exif else length + 4, os.SEEK_CUR)
    return found


def check_file(path: Path) -> None:
    """Raises BadSample if there is no such file, or if it is not an array and does not begin as an image."""
    if not path.is_file():
        raise BadSample(f'"{path}" does not exist')
    if path.suffix.lower() != ".npy":
        size_of(path)


def read_hint(path: Path, channels: int) -> np.ndarray:
    """(H, W, `channels`), as controlnet/hints/hint_file.py reads it. Raises BadSample."""
    try:
        return hint_file.read_hint(path, channels)
    except ValueError as error:
        raise BadSample(str(error)) from error


def check_same_shape(image_size: Size, hint: np.ndarray, entry: Entry) -> None:
    """A hint may be smaller or larger than its image, but not of another shape: it would lie askew on it."""
    (height, width), (hint_height, hint_width) = image_size, hint.shape[:2]
    if abs(hint_width * height - hint_height * width) > 0.02 * hint_height * width:
        raise BadSample(
            f'"{entry.hint}" is {hint_width}x{hint_height} and its image "{entry.image}" {width}x{height}, '
            "expected the same shape"
        )
