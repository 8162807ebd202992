"""Reading image files: the one place that opens them. Nothing here imports PyTorch."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def open_image(path: str | Path) -> Image.Image:
    """The image in a file as it is stored, of any mode, upright as its EXIF orientation says.

    Raises ValueError if there is no such file, or if it cannot be read completely as an image.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f'"{path}" {found}: give the path of an image')
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f'"{path}" is not readable as an image ({error}): give a whole PNG, JPEG or WebP') from error


def read_image(path: str | Path) -> Image.Image:
    """The image in a file as 8-bit RGB, with white behind its transparent parts.

    Raises ValueError as `open_image` does, and for 32 bits a channel, whose range nothing tells.
    """
    image = open_image(path)
    if image.mode in ("I", "F"):
        raise ValueError(f'"{path}" has 32 bits a channel, expected 8 or 16: save it with fewer')
    return to_rgb(image)


def read_mask(path: str | Path) -> Image.Image:
    """The image in a file as mode L. Raises ValueError as `read_image` does, and if it is black everywhere."""
    mask = read_image(path).convert("L")
    if not mask.getbbox():
        raise ValueError(f'the mask "{path}" is black everywhere: paint white where it should apply')
    return mask


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of 8 or 16 bits a channel as 8-bit RGB, with white behind its transparent parts."""
    if image.mode.startswith("I;16"):  # a depth map, for example; Pillow's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
