"""Canny edges, bit for bit those of OpenCV's `Canny` with its default aperture (3) and L1 gradient.

Source: J. Canny, "A computational approach to edge detection" (1986), in the integer arithmetic that OpenCV documents
and that tests/fixtures/hints records: Sobel gradients, non-maximum suppression in four directions, hysteresis.
Shapes: H W pixels.
"""

import numpy as np

# tan(22.5 degrees) in fixed point: flatter gradients count as horizontal, those above tan(67.5) = tan(22.5) + 2 as
# vertical.
FRACTION_BITS = 15
TAN_22 = round(np.tan(np.pi / 8) * 2**FRACTION_BITS)


def canny(image: np.ndarray, low: float = 100.0, high: float = 200.0, colour: bool = False) -> np.ndarray:
    """uint8 RGB (H, W, 3) -> uint8 (H, W), 255 on edges and 0 elsewhere.

    An edge is a ridge of |dx| + |dy| above `low` that is connected to a point above `high`; thresholds in the wrong
    order are swapped. Gradients are those of the gray image or, with `colour`, at each pixel the largest of the three
    channels, as OpenCV does with a colour image and as the published canny models were trained
    (annotator/canny/__init__.py): this also finds edges between colours of equal lightness.
    """
    low, high = sorted((int(np.floor(low)), int(np.floor(high))))
    dx, dy = strongest_gradient(image) if colour else sobel(to_gray(image))
    strength = np.abs(dx) + np.abs(dy)
    candidates = is_ridge(strength, dx, dy) & (strength > low)
    return connected(candidates, candidates & (strength > high)).astype(np.uint8) * 255


def to_gray(image: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) -> uint8 (H, W): 0.299 R + 0.587 G + 0.114 B in 15-bit fixed point, as OpenCV rounds it."""
    red, green, blue = image.astype(np.int32).transpose(2, 0, 1)
    return ((9798 * red + 19235 * green + 3735 * blue + 2**14) >> 15).astype(np.uint8)


def sobel(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W) -> 3x3 derivatives along x and y, int32 (H, W) each; border pixels are repeated outwards."""
    padded = np.pad(gray.astype(np.int32), 1, mode="edge")
    across = padded[:, 2:] - padded[:, :-2]  # (H + 2, W)
    down = padded[2:] - padded[:-2]  # (H, W + 2)
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return dx, dy


def strongest_gradient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3) -> dx, dy (H, W) of each pixel's channel with the largest |dx| + |dy|; the first of equals."""
    dx, dy = (np.stack(along) for along in zip(*map(sobel, np.moveaxis(image, 2, 0)), strict=True))  # (3, H, W)
    channel = (np.abs(dx) + np.abs(dy)).argmax(axis=0)[None]
    return np.take_along_axis(dx, channel, axis=0)[0], np.take_along_axis(dy, channel, axis=0)[0]


def is_ridge(strength: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Non-maximum suppression, bool (H, W): where the gradient exceeds that of both neighbours along its direction.

    Of two equal neighbours in a row or column the first is kept, on a diagonal neither. Outside, the strength is 0.
    """
    height, width = strength.shape
    padded = np.pad(strength, 1)

    def neighbour(down: int, right: int) -> np.ndarray:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(dx), np.abs(dy) << FRACTION_BITS  # at most 2^26
    horizontal = y < x * TAN_22
    vertical = y > x * TAN_22 + (x << (FRACTION_BITS + 1))
    falling = (dx ^ dy) >= 0  # the gradient points down and right, or up and left
    return np.select(
        [horizontal, vertical, falling],
        [
            (strength > neighbour(0, -1)) & (strength >= neighbour(0, 1)),
            (strength > neighbour(-1, 0)) & (strength >= neighbour(1, 0)),
            (strength > neighbour(-1, -1)) & (strength > neighbour(1, 1)),
        ],
        (strength > neighbour(-1, 1)) & (strength > neighbour(1, -1)),
    )


def connected(candidates: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """bool (H, W): the candidates that a chain of adjacent (8-connected) candidates joins to a seed."""
    height, width = candidates.shape
    waiting = np.pad(candidates & ~seeds, 1).ravel()  # the margin is not a candidate, so no chain leaves the image
    reached = np.pad(seeds, 1).ravel()
    row = width + 2
    around = np.array([-row - 1, -row, -row + 1, -1, 1, row - 1, row, row + 1])
    front = np.flatnonzero(reached)
    while front.size:
        near = (front[:, None] + around).ravel()
        front = np.unique(near[waiting[near]])
        waiting[front] = False
        reached[front] = True
    return reached.reshape(height + 2, row)[1:-1, 1:-1]
