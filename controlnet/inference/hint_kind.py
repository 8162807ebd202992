"""Which of the small ControlNets a hint is for, where nobody says it.

On a black ground (at least half of the image),
- pixels in the limb colours of drawn poses, whose weakest channel is next to nothing  -> "pose"
- one thin white circle, complete as far as it lies in the frame                       -> "circles"
- any other thin white lines                                                           -> "canny"
and anything else is not guessed.
"""

import numpy as np


def kind_of(pixels: np.ndarray) -> str | None:
    """A hint, uint8 RGB (H, W, 3) -> a short name of a small ControlNet, or None where it could be any or none."""
    strongest, weakest = pixels.max(axis=2).astype(int), pixels.min(axis=2).astype(int)
    lit = strongest > max(24, 0.35 * strongest.max())  # (H, W); thin lines that were resized are dim
    if not 0 < lit.mean() <= 0.5:
        return None
    coloured = (weakest < 0.25 * strongest)[lit].mean()
    white = (strongest - weakest < 48)[lit].mean()
    if coloured > 0.6:
        return "pose"
    if white < 0.9 or not is_thin(lit):
        return None
    return "circles" if is_circle(lit) else "canny"


def is_thin(lit: np.ndarray) -> bool:
    """Less than a fifth of it is left when the pixels next to the dark are taken away, as far as a 40th of the side."""
    kept = lit
    for _ in range(max(1, min(lit.shape) // 80)):
        padded = np.pad(kept, 1)
        kept = kept & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return kept.sum() < 0.2 * lit.sum()


def is_circle(lit: np.ndarray) -> bool:
    """Do all pixels lie on one circle, and pixels all along it as far as it is in the frame?

    The circle comes from least squares on x^2 + y^2 = 2 a x + 2 b y + c (Kasa, 1976).
    """
    height, width = lit.shape
    y, x = np.nonzero(lit)
    if len(x) < 3:
        return False
    (a, b, c), *_ = np.linalg.lstsq(np.stack([2 * x, 2 * y, np.ones_like(x)], axis=1), x**2 + y**2, rcond=None)
    radius = np.sqrt(max(0.0, c + a**2 + b**2))
    side, near = min(height, width), max(2.0, 0.015 * min(height, width))
    if not 0.02 * side < radius < side or (np.abs(np.hypot(x - a, y - b) - radius) > near).mean() > 0.01:
        return False
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    along = np.stack([a + radius * np.cos(angles), b + radius * np.sin(angles)], axis=1)
    in_frame = along[((along > 0) & (along < [width - 1, height - 1])).all(axis=1)]
    distances = np.hypot(in_frame[:, :1] - x, in_frame[:, 1:] - y).min(axis=1)
    return bool((distances <= near).mean() > 0.95)
