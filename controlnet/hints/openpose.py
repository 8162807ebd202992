"""Poses from the JSON files of OpenPose and of the pose editors that write its format.

Source: the OpenPose documentation, "Output format": people[].pose_keypoints_2d is x, y, confidence, x, y, confidence
... in the order of its model BODY_25 (25 keypoints) or COCO (18). The editors add canvas_width and canvas_height.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .pose import draw_pose

# COCO's keypoint i is BODY_25's COCO_IN_BODY_25[i]: all but the mid-hip (8) and the feet (19 to 24).
COCO_IN_BODY_25 = [*range(8), *range(9, 19)]

MAX_SIDE = 16384  # of a canvas, in pixels: a typo in a file must not exhaust the memory


@dataclass(frozen=True)
class Pose:
    """P people on a canvas of `height` x `width` pixels, each 0 if unknown."""

    keypoints: np.ndarray  # (P, 18, 3): x, y in pixels or parts of the canvas, and confidence, 0 if missing
    height: int
    width: int


def pose_hint(pose: Pose, *, height: int = 0, width: int = 0) -> np.ndarray:
    """The pose drawn (see pose.py) on its canvas, or on one of `height` and `width` pixels -> uint8 (H, W, 3)."""
    height, width = height or pose.height, width or pose.width
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"the pose's canvas is {width}x{height}, expected at most {MAX_SIDE} pixels a side")
    if height < 1 or width < 1:
        raise ValueError(
            "the pose file has no canvas_width and canvas_height: give the width and height, in pixels, of the image "
            "in which the pose was found"
        )
    # Coordinates in [0, 1] are parts of the canvas: as pixels, the whole pose would lie within the first one.
    points = pose.keypoints[..., :2]
    in_pixels = (np.abs(points) > 1).any()  # false for NaN
    scale = np.ones(2) if in_pixels else np.array([width, height])
    return draw_pose(np.concatenate([points * scale, pose.keypoints[..., 2:]], axis=-1), (height, width))


def read_pose(path: str | Path) -> Pose:
    """The people in an OpenPose JSON file, without hands and faces. Raises ValueError if it is not such a file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'"{path}" does not exist or is a folder: give the path of an OpenPose JSON file')
    try:
        frame = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(frame, list) and len(frame) == 1:  # some editors write a list of frames
            frame = frame[0]
        people = [person_keypoints(person["pose_keypoints_2d"]) for person in frame["people"] if has_body(person)]
        height, width = (int(frame.get(key) or 0) for key in ("canvas_height", "canvas_width"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f'"{path}" is not readable as a pose ({what}): expected OpenPose JSON, {{"people": [{{"pose_keypoints_2d": '
            '[x, y, confidence, ...]}], "canvas_width": ..., "canvas_height": ...}'
        ) from error
    return Pose(np.array(people, dtype=np.float64).reshape(-1, 18, 3), height, width)


def has_body(person: dict) -> bool:
    """Editors write people without a body if only a hand or the face is visible."""
    return bool(person["pose_keypoints_2d"])


def person_keypoints(numbers: list) -> np.ndarray:
    """54 or 75 numbers, None where missing -> (18, 3)."""
    keypoints = np.array(numbers, dtype=np.float64)  # None becomes NaN
    if keypoints.size == 18 * 3:
        return keypoints.reshape(18, 3)
    if keypoints.size == 25 * 3:
        return keypoints.reshape(25, 3)[COCO_IN_BODY_25]
    raise ValueError(f"a person has {keypoints.size} numbers, expected 54 (COCO) or 75 (BODY_25)")
