"""How good pictures are: fidelity, and what flat figures on a flat ground show, read off their pixels.

Pictures are uint8 (H, W, 3), masks bool (H, W).
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .colours import BASIC_COLOURS, COLOURS


def ground_colour(image: np.ndarray) -> np.ndarray:
    """The median colour of the frame's border, float (3,): what a flat ground shows there."""
    return np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)


def foreground(image: np.ndarray) -> np.ndarray:
    """Mask of what differs from the ground by more than 40 of 255, by Euclidean distance in RGB.

    Where nothing is twice as far from the ground, as in a circle of a colour near it, half of the largest distance
    counts, leaving out the last hundredth; below 30 of 255 there is no figure at all, and the mask is empty.
    """
    distance = np.linalg.norm(image - ground_colour(image), axis=-1)  # (H, W)
    largest = np.quantile(distance, 0.99)
    return distance > (min(40, largest / 2) if largest >= 30 else np.inf)


def keypoint_distance(mask: np.ndarray, keypoints: np.ndarray) -> float:
    """The mean distance in pixels from keypoints (N, 2), x and y, to the mask: 0 where all of them lie in it.

    An empty mask counts as one at the picture's far side: its diagonal.
    """
    if not mask.any():
        return float(np.hypot(*mask.shape))
    pixels = np.argwhere(mask)[:, ::-1] + 0.5  # (pixels, 2), x and y of their centres
    nearest = np.linalg.norm(keypoints[:, None] - pixels, axis=-1).min(axis=1)
    return float(np.maximum(nearest - 0.5**0.5, 0).mean())  # a point in a pixel is at most sqrt(1/2) from its centre


def colour_agreement(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """The share of the mask's pixels whose nearest basic colour is that of the true picture there."""
    return float((nearest_basic(image[mask]) == nearest_basic(truth[mask])).mean())


def nearest_basic(pixels: np.ndarray) -> np.ndarray:
    """(N, 3) -> the indices (N,) of the nearest of the basic colours."""
    table = np.array([COLOURS[name] for name in BASIC_COLOURS], np.float32)
    return np.linalg.norm(pixels[:, None] - table, axis=-1).argmin(axis=1)


def split_disc(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (mask of the disc, its colour, the ground's colour); colours are float (3,), 0 to 255.

    Two-means on the colours: the ground starts as what the frame's border shows, the disc as what differs most from it.
    Without anything that differs by more than 30 of 255 there is no disc: an empty mask, and the ground's colour twice.
    """
    pixels = image.astype(np.float32)
    ground = ground_colour(pixels)
    distance = np.linalg.norm(pixels - ground, axis=-1)  # (H, W)
    disc = np.median(pixels[distance >= np.quantile(distance, 0.98)], axis=0)
    for _ in range(5):
        mask = np.linalg.norm(pixels - disc, axis=-1) < np.linalg.norm(pixels - ground, axis=-1)
        if not mask.any() or np.linalg.norm(disc - ground) < 30:
            return np.zeros(image.shape[:2], bool), ground, ground
        disc, ground = np.median(pixels[mask], axis=0), np.median(pixels[~mask], axis=0)
    return mask, disc, ground


def nearest_colour(colour: np.ndarray, names: tuple[str, ...]) -> str:
    """The name whose colour is nearest, by Euclidean distance in RGB."""
    table = np.array([COLOURS[name] for name in names], np.float32)  # (names, 3)
    return names[int(np.linalg.norm(table - colour, axis=1).argmin())]


def same_colour(a: str, b: str) -> bool:
    """True also for the two pairs of names that CSS gives one colour: aqua and cyan, fuchsia and magenta."""
    return COLOURS[a] == COLOURS[b]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks; two empty ones agree."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (B, 3, H, W), averaged over the pictures."""
    mse = ((a - b) / 2).square().mean(dim=(1, 2, 3))
    return (-10 * mse.log10()).mean().item()


def pooled_psnr(images: Tensor) -> float:
    """The floor for an autoencoder of factor 8: the PSNR of 8x8 average pooling with bilinear upsampling."""
    return psnr(F.interpolate(F.avg_pool2d(images, 8), scale_factor=8, mode="bilinear"), images)
