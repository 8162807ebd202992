"""Reading image files: the one place that opens them. Nothing here imports PyTorch."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# By name, as Pillow decides by content, and hands PostScript to another program.
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "ICO", "PCX", "AVIF"]
FORMATS += ["PSD", "QOI", "SGI", "DDS"]
MAX_SIDE = 16384
MAX_PIXELS = 100_000_000

Ground = Callable[[Image.Image], str]  # image -> the colour behind its transparent parts


def open_image(path: str | Path) -> Image.Image:
    """The image in a file as it is stored, of any mode, upright as its EXIF orientation says.

    Raises ValueError if there is no such file, if it cannot be read completely as an image, or for more than `MAX_SIDE`
    pixels a side or `MAX_PIXELS` in all.
    """
    if not str(path):  # which would be the current folder
        raise ValueError("the path of an image is empty: give that of a file")
    if "://" in str(path):
        raise ValueError(f'"{path}" is an address, expected a file: download the image first')
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
        raise ValueError(f'"{path}" {found}: give the path of an image')
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if fits(*image.size):  # before the pixels are decoded: a few kilobytes can hold any number of equal ones
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
    except (UnidentifiedImageError, KeyError) as error:  # KeyError: an old Pillow lacks one of the formats
        raise ValueError(f'"{path}" is not readable as an image, expected {", ".join(FORMATS)}: convert it') from error
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f'"{path}" is not readable as an image ({error}): give a whole PNG, JPEG or WebP') from error
    if not fits(*image.size):
        raise ValueError(
            f'"{path}" has {image.width}x{image.height} pixels, expected at most {MAX_SIDE} a side and '
            f"{MAX_PIXELS // 10**6} million in all: make it smaller"
        )
    return image


def fits(width: int, height: int) -> bool:
    return max(width, height) <= MAX_SIDE and width * height <= MAX_PIXELS


def read_image(path: str | Path, ground: Ground | None = None) -> Image.Image:
    """The image in a file as 8-bit RGB, as `to_rgb` makes it. Raises ValueError as `open_image` does, and for 32 bits a
    channel, whose range is unknown."""
    return checked_rgb(open_image(path), path, ground)


def checked_rgb(image: Image.Image, path: str | Path, ground: Ground | None = None) -> Image.Image:
    check_depth(image, path)
    return to_rgb(image, ground)


def check_depth(image: Image.Image, path: str | Path) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(f'"{path}" has 32 bits a channel, expected 8 or 16: save it with fewer')


def in_8_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits a channel, a depth map's for example, which Pillow's own conversion would clip at 255."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def to_rgb(image: Image.Image, ground: Ground | None = None) -> Image.Image:
    """An image of 8 or 16 bits a channel as 8-bit RGB, with white behind its transparent parts, or what `ground` says:
    `ground_of_hint` or `ground_of_drawing`."""
    image = in_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    colour, result = ground(image) if ground else "white", Image.new("RGB", image.size)
    for top in range(0, image.height, 1024):  # in strips: intermediate images of a large one would take a gigabyte
        box = (0, top, image.width, min(top + 1024, image.height))
        strip = image.crop(box).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", strip.size, colour), strip).convert("RGB"), box)
    return result


# -------------------------------------------------------------------------------------------------------- transparency


def visible_part(image: Image.Image) -> tuple[np.ndarray, float]:
    """-> the colours of the pixels that are not transparent, int (N, 3), and their share, among 512x512 at most."""
    size = tuple(min(side, 512) for side in image.size)
    pixels = np.asarray(image.resize(size, Image.Resampling.NEAREST).convert("RGBA"))
    visible = pixels[..., 3] > 127
    return pixels[visible][:, :3].astype(int), float(visible.mean())


def ground_of_hint(image: Image.Image) -> str:
    """Black behind light or coloured strokes, white behind dark ones, and black where most of the image is visible,
    unless all of that is dark."""
    colours, share = visible_part(image)
    if not len(colours):
        return "black"
    strongest, weakest = colours.max(axis=1), colours.min(axis=1)
    light = ((strongest > 127) | (strongest - weakest > 48)).mean()
    return "white" if light < 0.02 or (light < 0.5 and share <= 0.5) else "black"


def ground_of_drawing(image: Image.Image) -> str:
    """Of a drawing for a detector, to which coloured strokes are dark. Where most of it is visible, most of that is the
    ground; else it is strokes, and the ground is their opposite."""
    colours, share = visible_part(image)
    light = (colours.min(axis=1) > 127).mean() if len(colours) else 0.0
    return "white" if light < 0.02 or (light >= 0.5) == (share > 0.5) else "black"


def erased_part(image: Image.Image) -> Image.Image | None:
    """Mode L, white where the image is transparent; None if less than one in a hundred pixels is."""
    if not image.has_transparency_data or visible_part(image)[1] > 0.99:
        return None
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


# --------------------------------------------------------------------------------------------------------------- masks


def read_mask(path: str | Path) -> Image.Image:
    """The mask in a file as mode L; if nothing in it is above 1, then 1 is white.

    If one colour is painted on a transparent ground, the paint is white; if an image in colours is partly erased, what
    is erased is. Raises ValueError as `read_image` does, and for a mask that is black everywhere.
    """
    image = open_image(path)
    mask = mask_of_transparency(image) or mask_of_values(image) or checked_rgb(image, path).convert("L")
    if mask.getextrema()[1] == 1:
        mask = mask.point(lambda value: 255 * value)
    if not mask.getbbox():
        raise ValueError(f'the mask "{path}" is black everywhere: paint white where it should apply')
    return mask


def mask_of_transparency(image: Image.Image) -> Image.Image | None:
    """None if nothing is transparent."""
    erased = erased_part(image)
    if erased is None:
        return None
    colours, _ = visible_part(image)
    if not len(colours) or np.ptp(colours, axis=0).max() < 32:
        return ImageOps.invert(erased)
    if np.ptp(colours, axis=1).max() >= 32:
        return erased
    rgba = image.convert("RGBA")  # gray: what is not painted is black
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("L")


def mask_of_values(image: Image.Image) -> Image.Image | None:
    """A mask of 16 or 32 bits a channel with values from 0 to 1; None for another image."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    values = np.asarray(image).astype(np.float64)
    in_range = values.min() >= 0 and values.max() <= 1  # false for NaN
    return Image.fromarray((255 * values).astype(np.uint8)) if in_range else None
