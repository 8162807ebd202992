"""Hints computed from the image by simple filters: edges, scribbles, gray, blur, shuffle, a hole to inpaint.

Each takes a uint8 RGB image (H, W, 3) and, except for those with a hole, returns such an image.
"""

import zlib

import numpy as np
from einops import reduce
from PIL import Image, ImageFilter

from .canny import canny, to_gray


def canny_hint(image: np.ndarray, *, low: float = 100.0, high: float = 200.0, colour: bool = False) -> np.ndarray:
    """White edges on black, with the published demos' thresholds; `colour` finds those between colours (canny.py)."""
    return as_rgb(canny(image, low, high, colour))


def scribble(image: np.ndarray, *, threshold: int = 127) -> np.ndarray:
    """Dark strokes on a bright background -> white strokes on black: where the darkest channel is below `threshold`.

    As in the published demo (gradio_scribble2image.py). For strokes that are already white on black, `threshold_hint`.
    """
    return as_rgb((image.min(axis=2) < threshold).astype(np.uint8) * 255)


def threshold_hint(image: np.ndarray, *, threshold: int = 127) -> np.ndarray:
    """White where the darkest channel is above `threshold`, black elsewhere."""
    return as_rgb((image.min(axis=2) > threshold).astype(np.uint8) * 255)


def gray(image: np.ndarray) -> np.ndarray:
    """Only the lightness: 0.299 R + 0.587 G + 0.114 B in each channel."""
    return as_rgb(to_gray(image))


def invert(image: np.ndarray) -> np.ndarray:
    """The negative: it turns black lines on white into the white lines on black that line models expect."""
    return 255 - image


def as_rgb(values: np.ndarray) -> np.ndarray:
    """uint8 (H, W) -> (H, W, 3) with three equal channels."""
    return values[..., None].repeat(3, axis=2)


# ---------------------------------------------------------------------------------------------------- less detail


def blur(image: np.ndarray, *, sigma: float = 9.0) -> np.ndarray:
    """Gaussian blur with a standard deviation of `sigma` pixels, approximated by Pillow with repeated box blurs."""
    if not 0 <= sigma <= 1000:
        raise ValueError(f"blur's sigma is {sigma}, expected 0 to 1000 pixels")
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def tile(image: np.ndarray, *, factor: int = 8) -> np.ndarray:
    """Reduced by `factor` (2, 4, 8 ...) with area averaging, and smoothly enlarged again.

    With factor 8 and sides that are multiples of 8, the hint is bit for bit that of the published tile demo (v1.1,
    gradio_tile.py) for an image of the hint's size, including its shift by (factor - 1) / 2 pixels up and left. Raises
    ValueError for a factor that is not a power of two from 1 to 64.
    """
    if factor not in (1, 2, 4, 8, 16, 32, 64):
        raise ValueError(f"tile's factor is {factor}, expected 2, 4, 8, 16, 32 or 64")
    height, width = image.shape[:2]
    whole = np.pad(image, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="edge")
    means = reduce(whole.astype(np.float64), "(h a) (w b) c -> h w c", "mean", a=factor, b=factor)
    tiled = np.rint(means).astype(np.uint8)
    for _ in range(factor.bit_length() - 1):
        tiled = pyramid_up(tiled)
    return tiled[:height, :width]


def pyramid_up(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (2 H, 2 W, 3), smoothed by (1, 4, 6, 4, 1): upsampling in Burt and Adelson's pyramid (1983).

    Bit for bit OpenCV's pyrUp, which mirrors the image at its top and left, and repeats the bottom and right borders.
    """
    doubled = doubled_along(doubled_along(image.astype(np.int32), axis=1), axis=0)
    return ((doubled + 32) >> 6).astype(np.uint8)


def doubled_along(values: np.ndarray, axis: int) -> np.ndarray:
    """Twice as many values, times 8: weighted by (1, 6, 1) at the old positions and by (4, 4) between them."""
    here = np.arange(values.shape[axis])
    before = values.take(np.where(here == 0, min(1, here[-1]), here - 1), axis)
    after = values.take(np.minimum(here + 1, here[-1]), axis)
    pairs = np.stack([before + 6 * values + after, 4 * (values + after)], axis=axis + 1)
    return pairs.reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])


# ---------------------------------------------------------------------------------------------------- other places


def shuffle(image: np.ndarray, *, seed: int = 0, cell: int = 256) -> np.ndarray:
    """The image's colours and textures moved to other places: smooth noise says where each pixel is fetched from.

    As in v1.1's annotator (annotator/shuffle), the noise has a random value every `cell` pixels. Here these values
    depend on the image and `seed` alone.
    """
    if cell < 1 or seed < 0:
        raise ValueError(
            f"shuffle's cell is {cell} and its seed {seed}, expected 1 or more pixels and no negative seed"
        )
    height, width = image.shape[:2]
    rng = np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(image))])
    x = smooth_noise(rng, height, width, cell) * (width - 1)
    y = smooth_noise(rng, height, width, cell) * (height - 1)
    return fetched(image, x, y)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """float32 (H, W) that spans [0, 1]: uniform noise on a coarse grid, with bicubic interpolation between its points.

    The grid covers a margin of one cell around the image.
    """
    coarse = rng.random((height // cell + 2, width // cell + 2), dtype=np.float32)
    rows, columns = coarse.shape[0] / (height + 2 * cell), coarse.shape[1] / (width + 2 * cell)  # per pixel
    box = (cell * columns, cell * rows, (cell + width) * columns, (cell + height) * rows)
    noise = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC, box))
    noise = noise - noise.min()
    return noise / max(noise.max(), 1e-6)


def fetched(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear sampling: uint8 (H, W, 3) at the pixel coordinates x, y, float (h, w) -> uint8 (h, w, 3)."""
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, image.shape[1] - 1), np.minimum(top + 1, image.shape[0] - 1)
    across, down = (x - left)[..., None], (y - top)[..., None]
    above = image[top, left] * (1 - across) + image[top, right] * across
    below = image[bottom, left] * (1 - across) + image[bottom, right] * across
    return np.rint(above * (1 - down) + below * down).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- a hole


def inpaint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The hint of the published inpaint model (v1.1): uint8 image, uint8 or bool mask (H, W) -> float32 (H, W, 3).

    Values are in [0, 1], as in every hint, and -1 in the hole, where the mask is brighter than 127: hence the floats.
    Raises ValueError if the sizes differ.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"the mask has the shape {mask.shape} and the image {image.shape}, expected one value for each pixel: "
            "resize the mask"
        )
    hole = mask if mask.dtype == bool else mask > 127
    return np.where(hole[..., None], np.float32(-1), image.astype(np.float32) / 255)


def inpaint_at_random(image: np.ndarray) -> np.ndarray:
    """`inpaint` for training, with a hole that depends on the image alone: half of the holes are rectangles, the others
    the low parts of smooth noise. It takes about a tenth to six tenths of the image, in one or several pieces."""
    rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(image)))
    height, width = image.shape[:2]
    if rng.random() < 0.5:
        high, wide = np.rint(rng.uniform(0.3, 0.8, size=2) * (height, width)).astype(int)
        top, left = rng.integers(height - high + 1), rng.integers(width - wide + 1)
        hole = np.zeros((height, width), bool)
        hole[top : top + high, left : left + wide] = True
    else:
        noise = smooth_noise(rng, height, width, cell=max(1, min(height, width) // int(rng.integers(2, 6))))
        hole = noise < np.quantile(noise, rng.uniform(0.1, 0.6))
    return inpaint(image, hole)
