"""How good pictures are: fidelity, and what a flat disc on a flat ground shows, read off its pixels.

Pictures are uint8 (H, W, 3), masks bool (H, W). Nothing here looks at the hint or the prompt that made the picture.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .colours import COLOURS


def split_disc(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (mask of the disc, its colour, the ground's colour); colours are float (3,), 0 to 255.

    Two-means on the colours: the ground starts as what the frame's border shows, the disc as what differs most from it.
    Without anything that differs by more than 30 of 255 there is no disc: an empty mask, and the ground's colour twice.
    """
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
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
