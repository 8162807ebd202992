"""Hints from measured or rendered maps: depth, surface normals and class labels.

Maps are arrays (H, W), normals (H, W, 3), from .npy or .npz files or from images of 8 or 16 bits a channel.
"""

from pathlib import Path

import numpy as np

from controlnet.common.files import read_arrays
from controlnet.common.image_files import open_image

from .ade20k import ADE20K
from .filters import as_rgb

UNLABELLED = 255  # by convention, in 8-bit label maps


def depth(values: np.ndarray, *, distance: bool = False) -> np.ndarray:
    """Numbers (H, W) -> uint8 (H, W, 3): the nearest is white, the farthest black, as in MiDaS's published depth.

    Larger values are nearer, as in disparity maps; with `distance` they are distances from the camera, and are
    inverted. Unknown values (NaN, infinity, and distances of 0 or less) are black. Raises ValueError for another shape
    and if no value is known.
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
    """Vectors (H, W, 3), or an image of them -> uint8 (H, W, 3): x, y, z in [-1, 1] as red, green, blue.

    Vectors are normalised; those of length 0 or with NaN are black. Integers are read as those of an image: 0 is -1,
    the largest value 1. The published v1.1 model expects ScanNet's axes, with blue towards the camera; `flip_x` and
    `flip_y` mirror the red and the green axis of other maps. Raises ValueError for another shape.
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
    """Class numbers of ADE20K (H, W) -> uint8 (H, W, 3) in its colours (ade20k.py).

    `first` is the number of the first class, "wall": 0, or 1 in the benchmark's own files. 255 and `first` - 1 mean no
    class, and are black. Raises ValueError for another shape and for other numbers.
    """
    labels = one_channel(labels)
    classes = labels.astype(np.float64) - first  # as floats, since unsigned integers have no -1
    named = np.isin(classes, np.arange(len(ADE20K)))
    wrong = ~named & (classes != -1) & (labels != UNLABELLED)
    if wrong.any():
        raise ValueError(
            f"the label map has the value {labels[wrong][0]}, expected the classes of ADE20K, {first} to "
            f"{first + len(ADE20K) - 1}, or {UNLABELLED} for none"
        )
    return np.where(named[..., None], ADE20K[np.where(named, classes, 0).astype(int)], 0).astype(np.uint8)


def one_channel(values: np.ndarray) -> np.ndarray:
    """(H, W) from (H, W), (1, H, W), (H, W, 1), or (H, W, 3) with three equal channels."""
    if values.ndim == 3 and values.shape[2] == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values.squeeze(axis=0 if values.shape[0] == 1 else 2)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"the map has the shape {values.shape}, expected one number for each pixel, (H, W), not colours: "
            "a map in colours needs no detector, and in a photograph the detector midas finds depth"
        )
    return values


def read_map(path: str | Path) -> np.ndarray:
    """The array in a .npy or .npz file, or an image's stored values: 16 bits and palette indices are kept.

    Raises ValueError for a file that is not readable, or that has no array of numbers or more than one.
    """
    path = Path(path)
    if path.suffix.lower() in (".npy", ".npz"):
        arrays = read_arrays(path)
        if len(arrays) != 1:
            raise ValueError(f'"{path}" has {len(arrays)} arrays ({", ".join(arrays)}), expected one')
        values = np.asarray(arrays.popitem()[1])  # a file within that is not an array becomes one of bytes
    else:
        values = image_values(path)
    if values.dtype.kind not in "biuf":
        raise ValueError(f'"{path}" holds {values.dtype}, expected numbers')
    return values


def image_values(path: Path) -> np.ndarray:
    image = open_image(path)
    if image.mode == "LA":
        image = image.convert("L")
    if image.mode in ("RGBA", "RGBX"):
        image = image.convert("RGB")
    if image.mode not in ("1", "L", "P", "I", "F", "RGB") and not image.mode.startswith("I;16"):
        raise ValueError(f'the pixels of "{path}" are {image.mode}, expected gray, palette or RGB: convert it')
    return np.asarray(image)
