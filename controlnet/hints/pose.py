"""Draws poses as the published pose models were trained on them: 18 COCO keypoints and their limbs, in colour on black.

Source: OpenPose (Cao et al., arXiv 1812.08008) for the order and colours of its COCO model; ControlNet v1.1 for the
drawing: limbs at 60 % brightness and over them joints at full brightness, 9 pixels wide at a short side of 512; on top
hands, thin lines in all hues with blue joints, and faces, white points.
Shapes: P people, N hands, F faces of K points, H W pixels.
"""

from collections.abc import Callable, Iterable

import numpy as np

KEYPOINTS = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle", "right eye", "left eye",
    "right ear", "left ear",
)  # fmt: skip

# Pairs of keypoints, in drawing order; limb i has colour i.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7),  # arms
    (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),  # legs
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),  # head
)  # fmt: skip

# Of a hand: from the wrist (0) along each finger, the thumb first.
HAND_LIMBS = tuple((0 if i % 4 == 0 else i, i + 1) for i in range(20))


def colour_wheel(steps: int) -> np.ndarray:
    """From red through green and blue: RGB (steps, 3)."""
    hues = 6 * np.arange(steps) / steps
    return np.rint(255 * np.clip([abs(hues - 3) - 1, 2 - abs(hues - 2), 2 - abs(hues - 4)], 0, 1)).astype(int).T


COLOURS, HAND_COLOURS = colour_wheel(18), colour_wheel(20)  # joint i of a body and limb i have colour i
BLUE, WHITE = np.array([0, 0, 255]), np.array([255, 255, 255])
LIMB_BRIGHTNESS = 0.6
LARGE = 4096  # pixels: in a larger rectangle only those near the limb are looked at


def draw_pose(
    keypoints: np.ndarray, size: tuple[int, int], hands: Iterable[np.ndarray] = (), faces: Iterable[np.ndarray] = ()
) -> np.ndarray:
    """Keypoints (18, 2 or 3) of one person, or (P, 18, 2 or 3), and (height, width) -> uint8 (H, W, 3).

    A hand is (21, 2 or 3), a face (K, 2 or 3). A keypoint is x, y in pixels (the first pixel spans 0 to 1), optionally
    with a confidence. With NaN or confidence 0 it is missing, and so are its limbs. Edges are anti-aliased, so that
    small images work too. Raises ValueError for another shape.
    """
    keypoints = np.asarray(keypoints, dtype=np.float64)
    if keypoints.ndim not in (2, 3) or keypoints.shape[-2] != len(KEYPOINTS) or keypoints.shape[-1] not in (2, 3):
        raise ValueError(f"the keypoints have the shape {keypoints.shape}, expected (18, 2 or 3) or (P, 18, 2 or 3)")
    canvas = np.zeros((*size, 3), dtype=np.float32)
    for person in keypoints.reshape(-1, *keypoints.shape[-2:]):
        draw_limbs(canvas, person, LIMBS, draw_ellipse, 4.5, LIMB_BRIGHTNESS * COLOURS)
        draw_joints(canvas, person, 4.5, COLOURS)
    for hand in hands:
        draw_limbs(canvas, hand, HAND_LIMBS, draw_line, 1.5, HAND_COLOURS)
        draw_joints(canvas, hand, 4.5, [BLUE] * len(hand))
    for face in faces:
        draw_joints(canvas, face, 3.5, [WHITE] * len(face))
    return np.rint(canvas).astype(np.uint8)


def draw_limbs(
    canvas: np.ndarray, keypoints: np.ndarray, limbs: tuple, draw: Callable, half_width: float, colours: np.ndarray
) -> None:
    """Draws each limb with both ends found onto `canvas`, float (H, W, 3), in place."""
    points, found = keypoints[:, :2], is_found(keypoints)
    for (start, end), colour in zip(limbs, colours, strict=False):  # a body's last colour is only a joint's
        if found[start] and found[end]:
            draw(canvas, points[start], points[end], scaled(half_width, canvas), colour)


def draw_joints(canvas: np.ndarray, keypoints: np.ndarray, radius: float, colours: Iterable[np.ndarray]) -> None:
    for keypoint, found, colour in zip(keypoints, is_found(keypoints), colours, strict=True):
        if found:
            draw_ellipse(canvas, keypoint[:2], keypoint[:2], scaled(radius, canvas), colour)


def is_found(keypoints: np.ndarray) -> np.ndarray:
    """(..., 2 or 3) -> bool (...): false where a keypoint is missing."""
    return np.isfinite(keypoints).all(axis=-1) & (keypoints[..., 2:] != 0).all(axis=-1)


def scaled(length: float, canvas: np.ndarray) -> float:
    """Scales a length from a canvas with a short side of 512, where a radius of 4.5 is a pixel and four around it."""
    return length * min(canvas.shape[:2]) / 512


def draw_ellipse(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, half_width: float, colour: np.ndarray) -> None:
    """Draws an ellipse from `start` to `end`, at least a disc, onto `canvas`, float (H, W, 3), in place."""
    direction, half_length = direction_and_half_length(start, end)
    half_length = max(half_length, half_width)
    reach = np.hypot(direction * half_length, direction[::-1] * half_width)  # of the tilted ellipse, along x and y
    pixels, x, y = pixels_around((start + end) / 2, direction, reach, half_width, canvas.shape)

    # The distance to the outline, to first order: (f - 1) / |grad f| with f = (u / length)^2 + (v / width)^2.
    u = (x * direction[0] + y * direction[1]) / half_length
    v = (y * direction[0] - x * direction[1]) / half_width
    f = u**2 + v**2
    slope = 2 * np.hypot(u / half_length, v / half_width)
    paint(canvas, pixels, (f - 1) / np.maximum(slope, 1e-6), colour)


def draw_line(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, half_width: float, colour: np.ndarray) -> None:
    """Draws a straight line with round ends onto `canvas`, float (H, W, 3), in place."""
    direction, half_length = direction_and_half_length(start, end)
    reach = np.abs(direction) * half_length + half_width + 1
    pixels, x, y = pixels_around((start + end) / 2, direction, reach, half_width, canvas.shape)
    beyond = np.maximum(np.abs(x * direction[0] + y * direction[1]) - half_length, 0)
    paint(canvas, pixels, np.hypot(beyond, y * direction[0] - x * direction[1]) - half_width, colour)


def direction_and_half_length(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, float]:
    along = (end - start) / 2
    half_length = np.hypot(*along)
    return along / half_length if half_length else np.array([1.0, 0.0]), half_length


def pixels_around(
    centre: np.ndarray, direction: np.ndarray, reach: np.ndarray, half_width: float, shape: tuple[int, ...]
) -> tuple[tuple, np.ndarray, np.ndarray]:
    """The pixels within `reach` of `centre`, as an index (rows, columns), and x and y of their middles as seen from it.
    If they are many, only those near the line through `centre`, to save time."""
    low, high = (
        np.clip(edge, 0, shape[1::-1]).astype(int) for edge in (np.floor(centre - reach), np.ceil(centre + reach))
    )
    columns, rows = np.arange(low[0], high[0]), np.arange(low[1], high[1])[:, None]
    pixels = slice(low[1], high[1]), slice(low[0], high[0])
    if rows.size * columns.size > LARGE:
        margin = int(1.5 * half_width) + 3  # half the width, measured along x or y: at most sqrt(2) times as much
        i, j = (0, 1) if abs(direction[0]) > abs(direction[1]) else (1, 0)  # the line advances along axis i
        along = np.arange(low[i], high[i])[:, None]
        middle = centre[j] + (along + 0.5 - centre[i]) * direction[j] / direction[i]
        across = np.floor(middle).astype(int) + np.arange(-margin, margin + 1)
        inside = (across >= low[j]) & (across < high[j])
        near = np.broadcast_to(along, across.shape)[inside], across[inside]
        columns, rows = near[i], near[j]
        pixels = rows, columns
    x = columns.astype(np.float32) + np.float32(0.5 - centre[0])
    y = rows.astype(np.float32) + np.float32(0.5 - centre[1])
    return pixels, x, y


def paint(canvas: np.ndarray, pixels: tuple, distance: np.ndarray, colour: np.ndarray) -> None:
    """Colours pixels of the canvas, in place, by the share of each that is covered; `distance` is to the outline."""
    part = canvas[pixels]
    canvas[pixels] = part + np.clip(0.5 - distance, 0, 1)[..., None] * (colour - part)
