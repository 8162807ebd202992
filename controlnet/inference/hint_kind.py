"""What a hint looks like: for which small ControlNet it is, and whether it is what its ControlNet reads.

Where no ControlNet is named, on a black ground (at least half of the image),
- thin lines in the limb colours of drawn poses, whose weakest channel is low            -> "pose"
- one thin white circle, complete as far as it lies in the frame                         -> "circles"
- any other thin white lines                                                             -> "canny"
- white strokes as of a pen                                                              -> "scribble"
and on any ground
- the colours of ADE20K's classes                                                        -> "seg"
- gray that is smooth except at a few edges                                              -> "depth"
Anything else is not guessed. Where a ControlNet's name says what it reads, a hint that looks otherwise gets a note.
Hints are uint8 RGB (H, W, 3).
"""

import re
from pathlib import Path

import numpy as np

from controlnet.hints import parse_detector
from controlnet.hints.ade20k import ADE20K
from controlnet.hints.hint_file import is_label_map

# ------------------------------------------------------------------------------------------------------------- guessing


def kind_of(pixels: np.ndarray) -> str | None:
    """A hint -> the short name of its small ControlNet, or None if it does not tell."""
    pixels = fewer(pixels, 2048)
    if lines := kind_of_lines(*channels(pixels)):
        return lines
    if is_segmentation(pixels):
        return "seg"
    return "depth" if is_smooth_gray(pixels) else None


def kind_of_lines(strongest: np.ndarray, weakest: np.ndarray) -> str | None:
    lit = is_lit(strongest)
    if not 0 < lit.mean() <= 0.5 or not is_thin(lit, 20):
        return None
    if (weakest < 0.5 * strongest)[lit].mean() > 0.6:  # half: JPEG makes the colours of thin lines pale
        return "pose"
    if (strongest - weakest < 48)[lit].mean() < 0.9:
        return None
    if is_circle(lit):
        return "circles"
    if width_of_lines(lit) < max(1.6, 0.0105 * min(lit.shape)):  # edges are one pixel wide, perhaps at 128x128
        return "canny"
    return "scribble" if (strongest < 32)[~lit].mean() > 0.8 else None  # a photograph is not that black


def channels(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strongest and the weakest of each pixel, int (H, W) each."""
    planes = in_planes(pixels)
    return planes.max(axis=0).astype(int), planes.min(axis=0).astype(int)


def in_planes(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (3, H, W), copied: NumPy reduces over a first axis 20 times as fast as over a last one of three."""
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0))


def is_lit(strongest: np.ndarray) -> np.ndarray:
    return strongest > max(24, 0.35 * strongest.max())  # (H, W); thin lines that were resized are dim


def is_thin(lit: np.ndarray, part: int) -> bool:
    """Whether an erosion as deep as 1/`part` of the short side leaves less than a fifth of what is lit."""
    kept = lit
    for _ in range(max(1, min(lit.shape) // part)):
        padded = np.pad(kept, 1)
        kept = kept & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return kept.sum() < 0.2 * lit.sum()


def width_of_lines(lit: np.ndarray) -> float:
    """Their mean width in pixels: twice the area over the number of sides between lit and dark pixels."""
    sides = (lit[1:] != lit[:-1]).sum() + (lit[:, 1:] != lit[:, :-1]).sum()
    return 2 * lit.sum() / max(1, sides)


def is_circle(lit: np.ndarray) -> bool:
    """Whether all lit pixels lie on one circle, which is lit wherever it is in the frame. Least squares fit it to
    x^2 + y^2 = 2 a x + 2 b y + c (Kasa, 1976)."""
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


# ---------------------------------------------------------------------------------------------------------------- looks


def is_flat(pixels: np.ndarray) -> bool:
    return np.ptp(in_planes(pixels), axis=(1, 2)).max() <= 24


def is_lines(pixels: np.ndarray, thinness: int = 20) -> bool:
    """Whether it is light lines on black without colour: edges or strokes, even soft ones."""
    strongest, weakest = channels(pixels)
    lit = is_lit(strongest)
    gray = (strongest - weakest < 48)[lit].mean() > 0.9
    return bool((strongest < 80).mean() > 0.45 and gray and is_thin(lit, thinness))


def is_inverted(pixels: np.ndarray) -> bool:
    return is_lines(255 - pixels)


def is_pose(pixels: np.ndarray) -> bool:
    """Faces are white, and may be most of it."""
    strongest, weakest = channels(pixels)
    lit = is_lit(strongest)
    coloured = (weakest < 0.5 * strongest)[lit].mean()
    return bool((strongest < 80).mean() > 0.5 and coloured > 0.2 and is_thin(lit, 20))


def is_depth(pixels: np.ndarray) -> bool:
    """Gray, and no thin lines."""
    return not is_coloured(pixels) and not is_lines(pixels, 80) and not is_lines(255 - pixels, 80)


def is_segmentation(pixels: np.ndarray) -> bool:
    some = pixels.reshape(-1, 3)[::17].T.astype(np.int16)  # (3, N)
    distances = np.abs(some[:, :, None] - ADE20K.T[:, None]).max(axis=0).min(axis=1)  # (3, N, classes) -> (N)
    return bool((distances <= 12).mean() > 0.5) and is_coloured(pixels)


def is_normal(pixels: np.ndarray) -> bool:
    """Vectors of length 1 that point to the camera; black is unknown."""
    known = pixels[channels(pixels)[0] > 8]
    length = np.linalg.norm(known / 127.5 - 1, axis=1)
    return bool(len(known) and (np.abs(length - 1) < 0.2).mean() > 0.6 and (known[:, 2] > 110).mean() > 0.8)


def is_smooth_gray(pixels: np.ndarray) -> bool:
    """Whether it is gray and mostly planes, on which three neighbours lie on one line, as a depth map is. Photographs
    have few planes, and drawings little gray."""
    if len(pixels) < 3:
        return False
    strongest, weakest = channels(pixels)
    planes = (np.abs(np.diff(strongest, n=2, axis=0)) <= 2).mean()
    gray = ((strongest > 16) & (strongest < 240)).mean()
    return bool((strongest - weakest).max() < 16 and planes > 0.85 and gray > 0.2 and not is_flat(pixels))


def is_coloured(pixels: np.ndarray) -> bool:
    strongest, weakest = channels(pixels)
    return bool((strongest - weakest > 48)[is_lit(strongest)].mean() > 0.05)


LINES, POSE, DEPTH = "light lines on black", "limbs in their colours on black", "a gray depth map"
SEGMENTATION, NORMAL = "a map in ADE20K's colours", "a normal map"
INVERTED, PHOTOGRAPH, GRAY = "dark lines on white", "a photograph", "a gray image"

# A hint is called by the first of these that applies: never DEPTH, which only names what a ControlNet reads.
LOOKS = {
    POSE: is_pose,
    LINES: is_lines,
    INVERTED: is_inverted,
    SEGMENTATION: is_segmentation,
    NORMAL: is_normal,
    PHOTOGRAPH: is_coloured,
    GRAY: is_depth,
    DEPTH: is_depth,
}

# ---------------------------------------------------------------------------------------------------------------- notes


# What a ControlNet reads, and the detector that makes it from a photograph, by a word in the ControlNet's name.
READS = {
    **dict.fromkeys(("circles", "fill50k"), (LINES, None)),
    "canny": (LINES, "canny"),
    "lineart": (LINES, "lineart"),
    "mlsd": (LINES, "mlsd"),
    **dict.fromkeys(("scribble", "softedge", "hed"), (LINES, "hed")),
    **dict.fromkeys(("pose", "openpose", "dwpose"), (POSE, "openpose")),
    **dict.fromkeys(("depth", "midas", "zoe"), (DEPTH, "midas")),
    **dict.fromkeys(("seg", "segmentation"), (SEGMENTATION, None)),
    **dict.fromkeys(("normal", "normalbae", "normals"), (NORMAL, None)),
}
THRESHOLDS = {"canny": "low=50,high=100", "mlsd": "score=0.05"}  # below the defaults


def reads_of(control: str) -> tuple[str | None, str | None]:
    """Of `READS`, by the name of a ControlNet's file or of the folder that it is in."""
    path = Path(control.lower())
    words = re.split("[^a-z0-9]+", path.stem) + re.split("[^a-z0-9]+", path.parent.name)
    return next((READS[word] for word in words if word in READS), (None, None))


def doubt(name: str, control: str, pixels: np.ndarray, detect: str = "none", source: np.ndarray | None = None) -> str:
    """A sentence if the hint from the file `name` is not what its ControlNet reads, "" otherwise. Unless `detect` is
    "none", it made the hint from the photograph `source`."""
    detector = None if detect == "none" else parse_detector(detect)[0]
    if detector is None and is_label_map(pixels):
        return f'"{name}" looks like a label map, whose numbers are black as colours: add --detect segmentation'
    if is_flat(pixels) or (source is not None and is_lit(channels(pixels)[0]).mean() < 0.001):
        lower = f": lower its thresholds, as in {detector}:{THRESHOLDS[detector]}" if detector in THRESHOLDS else ""
        return f'--detect {detect} finds nothing in "{name}"{lower}' if detector else f'"{name}" is of one colour'
    if source is not None and is_hint_already(fewer(source), detector):
        return f'"{name}" looks like a hint already: leave out --detect {detect}'
    (read, made_by), pixels = reads_of(control), fewer(pixels)
    if read is None or is_flat(pixels) or LOOKS[read](pixels):
        return ""
    found = looks_like(pixels)
    if detector:
        return f'--detect {detect} makes of "{name}" {found}, and {control} reads {read}'
    needed = "invert" if (read, found) == (LINES, INVERTED) else made_by if found in (PHOTOGRAPH, GRAY) else None
    return f'"{name}" looks like {found}, and {control} reads {read}{f": add --detect {needed}" if needed else ""}'


def looks_like(pixels: np.ndarray) -> str:
    pixels = fewer(pixels)
    if is_flat(pixels):
        return "one colour"
    return next((looks for looks, applies in LOOKS.items() if applies(pixels)), "something else")


def is_hint_already(source: np.ndarray, detector: str | None) -> bool:
    if detector == "openpose":
        return kind_of(source) == "pose"
    strongest, weakest = channels(source)
    drawn = ((strongest < 48) | (weakest > 170)).mean() > 0.9  # black and white, as no photograph is
    return bool(detector in ("canny", "hed", "lineart", "mlsd") and drawn and is_lines(source))


def fewer(pixels: np.ndarray, most: int = 512) -> np.ndarray:
    """Every nth pixel of a large image, so that a side has `most` at most, and lines stay thin."""
    step = -(-max(pixels.shape[:2]) // most)
    return pixels[::step, ::step]
