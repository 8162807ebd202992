"""Draws poses as the published pose models were trained on them: 18 COCO keypoints and their limbs, in colour on black.

Source: OpenPose (Cao et al., arXiv 1812.08008) for the order and colours of its COCO model; ControlNet v1.1 for the
drawing: limbs at 60 % brightness, joints over them at full brightness, 9 pixels wide at a short side of 512.
Shapes: P people, H W pixels.
"""

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

# Eighteen steps around the colour wheel, from red through green and blue: RGB (18, 3); joint i has colour i.
HUES = np.arange(18) / 3
COLOURS = np.rint(255 * np.clip([abs(HUES - 3) - 1, 2 - abs(HUES - 2), 2 - abs(HUES - 4)], 0, 1)).astype(int).T
LIMB_BRIGHTNESS = 0.6


def draw_pose(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Keypoints (18, 2 or 3) of one person, or (P, 18, 2 or 3), and (height, width) -> uint8 (H, W, 3).

    A keypoint is x, y in pixels (the first pixel spans 0 to 1), optionally with a confidence. With NaN or confidence 0
    it is missing, and so are its limbs; what lies outside the image is cut off. Edges are anti-aliased, so that small
    images work too. Raises ValueError for another shape.
    """
    keypoints = np.asarray(keypoints, dtype=np.float64)
    if keypoints.ndim not in (2, 3) or keypoints.shape[-2] != len(KEYPOINTS) or keypoints.shape[-1] not in (2, 3):
        raise ValueError(f"the keypoints have the shape {keypoints.shape}, expected (18, 2 or 3) or (P, 18, 2 or 3)")
    canvas = np.zeros((*size, 3), dtype=np.float32)
    for person in keypoints.reshape(-1, *keypoints.shape[-2:]):
        draw_person(canvas, person)
    return np.rint(canvas).astype(np.uint8)


def draw_person(canvas: np.ndarray, keypoints: np.ndarray) -> None:
    """Draws (18, 2 or 3) keypoints onto float (H, W, 3), in place."""
    half_width = 4.5 * min(canvas.shape[:2]) / 512  # at 512: 4 pixels to each side of the middle one
    points = keypoints[:, :2]
    found = np.isfinite(keypoints).all(axis=1) & (keypoints[:, 2:] != 0).all(axis=1)
    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):  # the last colour is only a joint's
        if found[start] and found[end]:
            draw_ellipse(canvas, points[start], points[end], half_width, LIMB_BRIGHTNESS * colour)
    for point, colour in zip(points[found], COLOURS[found], strict=True):
        draw_ellipse(canvas, point, point, half_width, colour)


def draw_ellipse(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, half_width: float, colour: np.ndarray) -> None:
    """Draws an ellipse from `start` to `end`, at least a disc, onto `canvas`, float (H, W, 3), in place."""
    centre, along = (start + end) / 2, (end - start) / 2
    half_length = np.hypot(*along)
    direction = along / half_length if half_length else np.array([1.0, 0.0])
    half_length = max(half_length, half_width)

    reach = np.hypot(direction * half_length, direction[::-1] * half_width)  # of the tilted ellipse, along x and y
    left, top = np.clip(np.floor(centre - reach), 0, canvas.shape[1::-1]).astype(int)
    right, bottom = np.clip(np.ceil(centre + reach), 0, canvas.shape[1::-1]).astype(int)
    x = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - centre[0])
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - centre[1])

    # The distance to the outline, to first order: (f - 1) / |grad f| with f = (u / length)^2 + (v / width)^2.
    u = (x * direction[0] + y * direction[1]) / half_length
    v = (y * direction[0] - x * direction[1]) / half_width
    f = u**2 + v**2
    slope = 2 * np.hypot(u / half_length, v / half_width)
    share = np.clip(0.5 - (f - 1) / np.maximum(slope, 1e-6), 0, 1)[..., None]  # of each pixel's area that is covered
    part = canvas[top:bottom, left:right]
    part += share * (colour - part)
