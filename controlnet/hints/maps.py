"""Hints from measured or rendered maps: depth, surface normals and class labels, from arrays and from pictures of them.

Maps are arrays (H, W), normals (H, W, 3), in .npy or .npz files or in pictures of 8 or 16 bits.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .ade20k import ADE20K
from .filters import as_rgb

UNLABELLED = 255  # by custom, in 8-bit label maps


def depth(values: np.ndarray, *, distance: bool = False) -> np.ndarray:
    """Numbers (H, W) -> uint8 (H, W, 3): the nearest white, the farthest black, as MiDaS's depth is published.

    The larger a value the nearer, as in disparities and in the depth pictures of this field; with `distance` they are
    lengths from the camera, and their inverse is taken. What is not known (NaN, infinity, in distances also 0 and less)
    is black. Raises ValueError for another shape.
    """
    nearness = one_channel(values).astype(np.float64)
    known = np.isfinite(nearness)
    if distance:
        known &= nearness > 0
        nearness = np.divide(1, nearness, where=known, out=np.zeros_like(nearness))
    if not known.any():
        raise ValueError("the depth map has no finite value: it is empty or damaged")
    far, near = nearness[known].min(), nearness[known].max()
    shown = np.where(known, nearness - far, 0) / ((near - far) or 1)
    return as_rgb(np.rint(255 * shown).astype(np.uint8))


def normal(values: np.ndarray, *, flip_x: bool = False, flip_y: bool = False) -> np.ndarray:
    """Vectors (H, W, 3), or a picture of them -> uint8 (H, W, 3): x, y, z from -1 .. 1 as red, green, blue.

    They are scaled to length 1; those of length 0 or with NaN are black. Integers are taken as a picture's, from 0 for
    -1 to the largest for 1. The published v1.1 model knows ScanNet's axes, blue towards the camera: `flip_x` and
    `flip_y` mirror the red and the green axis of maps that were made with others. Raises ValueError for another shape.
    """
    if values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(f"the normal map has the shape {values.shape}, expected (H, W, 3): vectors x, y, z")
    vectors = values.astype(np.float64)
    if np.issubdtype(values.dtype, np.integer):
        vectors = 2 * vectors / np.iinfo(values.dtype).max - 1
    vectors = vectors * np.array([-1 if flip_x else 1, -1 if flip_y else 1, 1])
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    known = np.isfinite(length) & (length > 0)
    unit = np.divide(vectors, length, where=known, out=np.zeros_like(vectors))
    return np.where(known, np.rint(127.5 * (unit + 1)), 0).astype(np.uint8)


def segmentation(labels: np.ndarray, *, first: int = 0) -> np.ndarray:
    """Whole numbers (H, W), the classes of ADE20K -> uint8 (H, W, 3) in its colours (ade20k.py); 255 is black.

    `first` is the number of the first class, "wall": 0, or 1 in the benchmark's own files. The number before it is no
    class and black, too. Raises ValueError for another shape and for numbers that are no class.
    """
    labels = one_channel(labels)
    classes = labels.astype(np.float64) - first  # floats: unsigned integers have no -1
    named = np.isin(classes, np.arange(len(ADE20K)))
    wrong = ~named & (classes != -1) & (labels != UNLABELLED)
    if wrong.any():
        raise ValueError(
            f"the label map has the value {labels[wrong][0]}, expected the classes of ADE20K, {first} to "
            f"{first + len(ADE20K) - 1}, or {UNLABELLED} for none"
        )
    return np.where(named[..., None], ADE20K[np.where(named, classes, 0).astype(int)], 0).astype(np.uint8)


def one_channel(values: np.ndarray) -> np.ndarray:
    """(H, W) from (H, W), (1, H, W), (H, W, 1), and from a gray picture that was saved as RGB."""
    if values.ndim == 3 and values.shape[2] == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values.squeeze(axis=0 if values.shape[0] == 1 else 2)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"the map has the shape {values.shape}, expected one number for each pixel, (H, W); a colour photograph is "
            "no map"
        )
    return values


def read_map(path: str | Path) -> np.ndarray:
    """The array in a .npy or .npz file, or a picture's numbers as they are stored: 16 bits and palette indices too.

    Raises ValueError if there is none, more than one, or it holds no numbers.
    """
    path = Path(path)
    try:
        values = load_numbers(path) if path.suffix.lower() in (".npy", ".npz") else picture_numbers(path)
    except ValueError as error:
        raise ValueError(f'"{path}" is not readable as a map: {error}') from error
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f'"{path}" is not readable as a map ({error}): give a .npy, .npz, PNG or TIFF file') from error
    if values.dtype.kind not in "biuf":
        raise ValueError(f'"{path}" holds {values.dtype}, expected numbers')
    return values


def load_numbers(path: Path) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if len(loaded.files) != 1:
            raise ValueError(f"it has {len(loaded.files)} arrays ({', '.join(loaded.files)}), expected one")
        return loaded[loaded.files[0]]


def picture_numbers(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
    if image.mode == "LA":
        image = image.convert("L")
    if image.mode in ("RGBA", "RGBX"):
        image = image.convert("RGB")
    if image.mode not in ("1", "L", "P", "I", "F", "RGB") and not image.mode.startswith("I;16"):
        raise ValueError(f"its pixels are {image.mode}, expected gray, palette or RGB: convert it")
    return np.asarray(image)
