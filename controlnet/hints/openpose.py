"""Poses from the JSON files of OpenPose and of the editors that write its format, or one like it.

Source: the OpenPose documentation, "Output format": people[].pose_keypoints_2d is x, y, confidence, x, y, confidence
... in the order of its model BODY_25 (25 keypoints) or COCO (18); beside it are hands (21) and a face (70, or 68 of
other detectors). Editors add canvas_width and canvas_height, or width and height, and write pairs without a confidence,
lists of frames, or "keypoints" of all people in one list (openpose-editor).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlnet.common.files import read_json

from .pose import draw_pose, is_found

BODY, HANDS, FACE = "pose_keypoints_2d", ("hand_left_keypoints_2d", "hand_right_keypoints_2d"), "face_keypoints_2d"

# COCO's keypoint i is BODY_25's COCO_IN_BODY_25[i]: all but the mid-hip (8) and the feet (19 to 24).
COCO_IN_BODY_25 = [*range(8), *range(9, 19)]

MAX_PEOPLE = 300
MAX_SIDE, MAX_MILLIONS = 16384, 20  # of a canvas, in pixels: a typo in a file must not exhaust the memory
FARTHEST = 1e6  # in pixels: a keypoint beyond counts as missing; a huge one would overflow when it is drawn
USUAL_SIDE = 512  # of the canvas, where neither the file nor its keypoints tell


@dataclass(frozen=True)
class Pose:
    """People on a canvas of `height` x `width` pixels, each 0 if unknown.

    Keypoints are x, y, in pixels or parts of the canvas, and a confidence, 0 if missing.
    """

    bodies: np.ndarray  # (P, 18, 3)
    hands: np.ndarray  # (N, 21, 3)
    faces: list[np.ndarray]  # of (68 or 70, 3)
    height: int
    width: int


def pose_hint(pose: Pose, *, height: int = 0, width: int = 0) -> np.ndarray:
    """The pose drawn (pose.py) on a canvas of `height` and `width` pixels, by default its own -> uint8 (H, W, 3).

    If the pose has no canvas, one is chosen with the pose in its middle, and a warning says so.
    """
    height, width = height or pose.height, width or pose.width
    if height < 1 or width < 1:
        height, width = guessed_canvas(pose)
        warnings.warn(
            f"the pose file lacks its image's size, taking {width}x{height} (width x height): if that is wrong, "
            f'say it with the detector, as in "pose:width={width},height={height}"',
            stacklevel=2,
        )
    if max(height, width) > MAX_SIDE or height * width > MAX_MILLIONS * 10**6:
        raise ValueError(
            f"the pose's canvas is {width}x{height}, expected at most {MAX_SIDE} pixels a side and {MAX_MILLIONS} "
            "million in all"
        )
    size = height, width
    hands, faces = in_pixels(pose.hands, size), [in_pixels(face, size) for face in pose.faces]
    return draw_pose(in_pixels(pose.bodies, size), size, hands, faces)


def guessed_canvas(pose: Pose) -> tuple[int, int]:
    """(height, width), with as much room beyond the last keypoint as before the first."""
    parts = [part for part in (pose.bodies, pose.hands, *pose.faces) if not is_normalised(part)]
    points = np.concatenate([part[is_found(part), :2] for part in parts] or [np.zeros((0, 2))])
    if not len(points):
        return USUAL_SIDE, USUAL_SIDE
    width, height = np.ceil(np.maximum(points.min(axis=0), 0) + points.max(axis=0)).clip(1).astype(int).tolist()
    return height, width


def in_pixels(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    scale = [size[1], size[0], 1] if is_normalised(keypoints) else 1
    return keypoints * scale


def is_normalised(keypoints: np.ndarray) -> bool:
    """Whether x and y of these keypoints (..., 3) are parts of the canvas: as pixels, most would be in its corner."""
    points = keypoints[is_found(keypoints), :2]
    return bool(len(points)) and ((points > -1) & (points < 2)).all(axis=1).mean() > 0.5


def read_pose(path: str | Path) -> Pose:
    """The people in a pose file of any of the layouts above. Raises ValueError if it is not such a file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'"{path}" does not exist or is a folder: give the path of an OpenPose JSON file')
    try:
        frame = first_frame(read_json(path))
        people = people_in(frame)
        if len(people) > MAX_PEOPLE:
            raise ValueError(f"it has {len(people)} people, expected at most {MAX_PEOPLE}")
        # Editors write null or an empty list for what is not visible.
        bodies = [coco(keypoints_of(person[BODY], (18, 25))) for person in people if person.get(BODY)]
        hands = [keypoints_of(person[hand], (21,)) for person in people for hand in HANDS if person.get(hand)]
        faces = [keypoints_of(person[FACE], (70, 68)) for person in people if person.get(FACE)]
        sides = (frame.get(f"canvas_{name}") or frame.get(name) or 0 for name in ("height", "width"))
        height, width = (int(float(side)) for side in sides)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        what = error
        if isinstance(error, UnicodeDecodeError):
            what = "it is not text: the detector openpose finds poses in a photograph, and a drawn pose needs none"
        elif isinstance(error, KeyError):
            what = f"it has no {error}"
        elif not isinstance(error, ValueError):
            what = "something in it is of the wrong type"
        raise ValueError(
            f'"{path}" is not readable as a pose ({what}): expected OpenPose JSON, {{"people": [{{"pose_keypoints_2d": '
            '[x, y, confidence, ...]}], "canvas_width": ..., "canvas_height": ...}'
        ) from error
    return Pose(np.reshape(bodies, (-1, 18, 3)), np.reshape(hands, (-1, 21, 3)), faces, height, width)


def first_frame(content: Any) -> dict:
    """The first of a list of frames, which some editors write. Raises ValueError for what is not a frame."""
    frames = content if isinstance(content, list) else [content]
    if not frames or not isinstance(frames[0], dict):
        raise ValueError("it is not a JSON object or list of such")
    if len(frames) > 1:
        warnings.warn(f"the pose file has {len(frames)} frames: taking the first", stacklevel=2)
    return frames[0]


def people_in(frame: dict) -> list[dict]:
    """The people of a frame. Raises KeyError for one with neither body nor hands nor face, ValueError for no object."""
    if "keypoints" in frame:
        return [{BODY: person} for person in split_people(frame["keypoints"])]
    people = [frame] if BODY in frame else frame["people"]
    for person in people:
        if not isinstance(person, dict):
            raise ValueError("a person is not a JSON object")
        if not {BODY, *HANDS, FACE} & person.keys():
            raise KeyError(BODY)
    return people


def split_people(keypoints: list) -> list[list]:
    """A list for each person, from such lists or from one of all people's points (18 each) or numbers (54 each)."""
    first = keypoints[0] if keypoints else []
    if isinstance(first, list) and len(first) > 3:
        return keypoints
    length = 18 if isinstance(first, list) else 54
    return [keypoints[i : i + length] for i in range(0, len(keypoints), length)]


def keypoints_of(numbers: Sequence, counts: tuple[int, ...]) -> np.ndarray:
    """Numbers or points, null where missing -> (K, 3) with K one of `counts`."""
    try:
        values = np.array(numbers, dtype=np.float64)  # None becomes NaN
    except (ValueError, TypeError) as error:
        raise ValueError("its keypoints are not numbers, or not as many for each point") from error
    for count, wide in ((count, wide) for count in counts for wide in (2, 3)):
        if values.shape in ((count * wide,), (count, wide)):
            points = values.reshape(count, wide)
            given = np.ones(count) if wide == 2 else points[:, 2]
            nowhere = (points[:, :2] == 0).all(axis=1) | (points[:, :2] == -1).all(axis=1)  # how some write "missing"
            nowhere |= (np.abs(points[:, :2]) > FARTHEST).any(axis=1)
            return np.column_stack([points[:, :2], np.where(nowhere, 0, given)])
    expected = " or ".join(f"{count} keypoints" for count in counts)
    raise ValueError(f"it has {values.size} numbers where those of {expected} are expected")


def coco(keypoints: np.ndarray) -> np.ndarray:
    """(18 or 25, 3) -> (18, 3)"""
    return keypoints if len(keypoints) == 18 else keypoints[COCO_IN_BODY_25]
