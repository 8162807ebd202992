"""Measures of generated images: PSNR, and what plain figures on a plain background show, read from their pixels.

Images are uint8 (H, W, 3), masks bool (H, W).
"""

import itertools

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .colours import BASIC_COLOURS, COLOURS


def ground_colour(image: np.ndarray) -> np.ndarray:
    """The median colour of the border pixels, float (3,): that of a plain background."""
    return np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)


def foreground(image: np.ndarray) -> np.ndarray:
    """The mask of pixels whose Euclidean distance in RGB from the background is above 40 of 255 or, if that is lower,
    above half the 99th percentile of all distances. If this percentile is below 30, there is no figure, and the mask is
    empty."""
    distance = np.linalg.norm(image - ground_colour(image), axis=-1)  # (H, W)
    largest = np.quantile(distance, 0.99)
    return distance > (min(40, largest / 2) if largest >= 30 else np.inf)


def keypoint_distance(mask: np.ndarray, keypoints: np.ndarray) -> float:
    """The mean distance in pixels from keypoints (N, 2), x and y, to the mask: 0 if it contains all of them, and the
    image's diagonal if it is empty."""
    if not mask.any():
        return float(np.hypot(*mask.shape))
    pixels = np.argwhere(mask)[:, ::-1] + 0.5  # (pixels, 2), x and y of their centres
    nearest = np.linalg.norm(keypoints[:, None] - pixels, axis=-1).min(axis=1)
    return float(np.maximum(nearest - 0.5**0.5, 0).mean())  # a point in a pixel is at most sqrt(1/2) from its centre


def colour_agreement(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """The fraction of the mask's pixels whose nearest basic colour is the same as in the true image."""
    return float((nearest(image[mask], BASIC_COLOURS) == nearest(truth[mask], BASIC_COLOURS)).mean())


def split_disc(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (mask of the disc, its colour, the background's colour); colours are float (3,), 0 to 255.

    2-means clustering of the colours, initialised with the border's colour and the colour that differs most from it. If
    the two differ by less than 30 of 255 there is no disc: an empty mask, and the background's colour twice.
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
    return names[int(nearest(colour[None], names)[0])]


def nearest(pixels: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """(N, 3) -> the numbers (N,) of the nearest of these colours, by Euclidean distance in RGB."""
    table = np.array([COLOURS[name] for name in names], np.float32)  # (names, 3)
    return np.linalg.norm(pixels[:, None] - table, axis=-1).argmin(axis=1)


def same_colour(a: str, b: str) -> bool:
    """Also true for CSS's two pairs of synonyms: aqua and cyan, fuchsia and magenta."""
    return COLOURS[a] == COLOURS[b]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def mean_iou(shown: np.ndarray, true: np.ndarray) -> float:
    """The mean IoU of the masks of each number in `true`, of things or of classes; both int (H, W), negative where
    nothing is."""
    return float(np.mean([iou(shown == number, true == number) for number in np.unique(true) if number >= 0]))


def palette_distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far the colours of `a` must move on average to become those of `b`, wherever in the image: the sliced
    Wasserstein distance (Rabin et al., SSVM 2011) of two images of one size, in levels of 255, over 13 directions in
    RGB."""
    directions = np.array([d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0)]).T  # (3, 13)
    directions = directions / np.linalg.norm(directions, axis=0)
    ranked = [np.sort(image.reshape(-1, 3) @ directions, axis=0) for image in (a, b)]
    return float(np.abs(ranked[0] - ranked[1]).mean())


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (B, 3, H, W), averaged over the batch."""
    mse = ((a - b) / 2).square().mean(dim=(1, 2, 3))
    return (-10 * mse.log10()).mean().item()


def pooled_psnr(images: Tensor) -> float:
    """A baseline for a VAE of factor 8: the PSNR of 8x8 average pooling with bilinear upsampling."""
    return psnr(F.interpolate(F.avg_pool2d(images, 8), scale_factor=8, mode="bilinear"), images)
