"""Hints: what a ControlNet reads, made from photographs, poses, and depth, normal and label maps.

    from controlnet.hints import DETECTORS, detect, detect_file

    hint = detect("canny", photograph, low=50)      # uint8 RGB (H, W, 3) -> uint8 RGB (H, W, 3)
    hint = detect_file("pose", "dancer.json")       # reads whatever file the detector works on

Each detector's docstring gives its options and its source. Only the learned ones need PyTorch.
"""

from .detectors import (
    DETECTORS,
    LEARNED_NOTE,
    detect,
    detect_file,
    find_detector,
    options_of,
    options_text,
    parse_detector,
)
from .filters import inpaint, inpaint_at_random
from .learned import NotInstalledError

__all__ = [
    "DETECTORS",
    "LEARNED_NOTE",
    "NotInstalledError",
    "detect",
    "detect_file",
    "find_detector",
    "inpaint",
    "inpaint_at_random",
    "options_of",
    "options_text",
    "parse_detector",
]
