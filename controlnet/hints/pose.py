"""Drawing poses as the published pose models were taught: coloured limbs and joints of the 18 COCO keypoints on black.

Source: OpenPose (Cao et al., arXiv 1812.08008), the order and colours of its COCO model, and the drawing of ControlNet
v1.1: limbs at 60 % of their colours, joints above them in full, 9 pixels wide where the short side has 512.
Shapes: P people, H W pixels.
"""

import numpy as np

KEYPOINTS = (
    "nose",
    "neck",
    "right shoulder",
    "right elbow",
    "right wrist",
    "left shoulder",
    "left elbow",
    "left wrist",
    "right hip",
    "right knee",
    "right ankle",
    "left hip",
    "left knee",
    "left ankle",
    "right eye",
    "left eye",
    "right ear",
    "left ear",
)

# Pairs of keypoints, in the order in which they are drawn; limb i has colour i.
LIMBS = (
    (1, 2),
    (1, 5),
    (2, 3),
    (3, 4),
    (5, 6),
    (6, 7),
    (1, 8),
    (8, 9),
    (9, 10),
    (1, 11),
    (11, 12),
    (12, 13),
    (1, 0),
    (0, 14),
    (14, 16),
    (0, 15),
    (15, 17),
)

# Eighteen steps around the colour circle, from red by way of green and blue to red again; joint i has colour i.
COLOURS = np.array(
    [
        (255, 0, 0),
        (255, 85, 0),
        (255, 170, 0),
        (255, 255, 0),
        (170, 255, 0),
        (85, 255, 0),
        (0, 255, 0),
        (0, 255, 85),
        (0, 255, 170),
        (0, 255, 255),
        (0, 170, 255),
        (0, 85, 255),
        (0, 0, 255),
        (85, 0, 255),
        (170, 0, 255),
        (255, 0, 255),
        (255, 0, 170),
        (255, 0, 85),
    ]
)
LIMB_BRIGHTNESS = 0.6


def draw_pose(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Keypoints (18, 2 or 3) of one person, or (P, 18, 2 or 3), and (height, width) -> uint8 (H, W, 3).

    A keypoint is x, y in pixels, the first pixel reaching from 0 to 1, and perhaps a confidence. One with NaN, or with
    the confidence 0, is missing, and so are its limbs; what lies outside the picture is cut off. Edges are smooth, so
    that small pictures can be drawn too. Raises ValueError for another shape.
    """
    keypoints = np.asarray(keypoints, dtype=np.float64)
    if keypoints.ndim not in (2, 3) or keypoints.shape[-2] != len(KEYPOINTS) or keypoints.shape[-1] not in (2, 3):
        raise ValueError(f"the keypoints have the shape {keypoints.shape}, expected (18, 2 or 3) or (P, 18, 2 or 3)")
    canvas = np.zeros((*size, 3), dtype=np.float32)
    for person in keypoints.reshape(-1, *keypoints.shape[-2:]):
        draw_person(canvas, person)
    return np.rint(canvas).astype(np.uint8)


def draw_person(canvas: np.ndarray, keypoints: np.ndarray) -> None:
    """Draw (18, 2 or 3) keypoints onto float (H, W, 3)."""
    half_width = 4.5 * min(canvas.shape[:2]) / 512  # 4 to each side of the middle pixel
    points = keypoints[:, :2]
    there = np.isfinite(keypoints).all(axis=1) & (keypoints[:, 2:] != 0).all(axis=1)
    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):  # the last colour is a joint's alone
        if there[start] and there[end]:
            draw_ellipse(canvas, points[start], points[end], half_width, LIMB_BRIGHTNESS * colour)
    for point, colour in zip(points[there], COLOURS[there], strict=True):
        draw_ellipse(canvas, point, point, half_width, colour)


def draw_ellipse(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, half_width: float, colour: np.ndarray) -> None:
    """Cover `canvas`, float (H, W, 3), by an ellipse from `start` to `end`, or by a disc where it would be shorter."""
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
    share = np.clip(0.5 - (f - 1) / np.maximum(slope, 1e-6), 0, 1)[..., None]  # of each pixel that is covered
    part = canvas[top:bottom, left:right]
    part += share * (colour - part)
