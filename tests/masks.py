"""Masks of what worlds draw, for the tests that look beside their edges."""

import numpy as np
import torch
import torch.nn.functional as F


def grown(mask: np.ndarray, by: int = 1) -> np.ndarray:
    """A mask (H, W) and the pixels that are at most `by` from it, along rows and columns."""
    return F.max_pool2d(torch.from_numpy(mask[None]).float(), 2 * by + 1, stride=1, padding=by)[0].numpy() > 0
