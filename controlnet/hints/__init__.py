"""Hints: what a ControlNet reads, made from photographs, poses, depth, normal and label maps.

    from controlnet.hints import DETECTORS, detect, detect_file

    hint = detect("canny", photograph, low=50)      # uint8 RGB (H, W, 3) -> uint8 RGB (H, W, 3)
    hint = detect_file("pose", "dancer.json")       # reads what the detector works on

Each detector's docstring gives its options and its source. None needs torch, but for those that are learned.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import learned
from .canny import canny
from .filters import blur, canny_hint, gray, inpaint, invert, scribble, shuffle, threshold_hint, tile
from .learned import NotInstalledError
from .maps import depth, normal, read_map, segmentation
from .openpose import pose_hint, read_pose
from .pose import draw_pose

__all__ = [
    "DETECTORS",
    "LEARNED_NOTE",
    "Detector",
    "NotInstalledError",
    "canny",
    "detect",
    "detect_file",
    "draw_pose",
    "find_detector",
    "in_words",
    "inpaint",
    "options_of",
    "parse_options",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAPS = (".npy", ".npz", *PICTURES)
POSES = (".json",)


def read_photograph(path: str | Path) -> np.ndarray:
    """uint8 RGB (H, W, 3). Raises ValueError if the file is no picture."""
    from controlnet.common.images import read_image  # here, because it imports torch

    return np.asarray(read_image(path))


@dataclass(frozen=True)
class Detector:
    """`make` takes what `read` finds in a file, and options as keywords, and returns a hint, uint8 (H, W, 3)."""

    make: Callable[..., np.ndarray]
    about: str  # one line for people
    read: Callable[[Path], Any] = read_photograph
    suffixes: tuple[str, ...] = PICTURES  # of the files that `read` reads

    @property
    def works_on_photographs(self) -> bool:
        return self.read is read_photograph


DETECTORS = {
    "canny": Detector(canny_hint, "edges, one pixel wide (Canny)"),
    "scribble": Detector(scribble, "dark strokes on white paper -> white strokes on black"),
    "threshold": Detector(threshold_hint, "white where the picture is bright, else black"),
    "gray": Detector(gray, "the picture without its colours"),
    "invert": Detector(invert, "the negative: black lines on white -> white lines on black"),
    "blur": Detector(blur, "the picture without fine detail (Gaussian blur)"),
    "tile": Detector(tile, "the picture from one of an eighth of its size, for tile models"),
    "shuffle": Detector(shuffle, "the picture's colours at other places, for shuffle models"),
    "pose": Detector(pose_hint, "poses drawn from OpenPose JSON", read_pose, POSES),
    "depth": Detector(depth, "a depth map (.npy, .npz, 8- or 16-bit picture), near is white", read_map, MAPS),
    "normal": Detector(normal, "a map of surface normals (.npy, .npz or picture)", read_map, MAPS),
    "segmentation": Detector(segmentation, "a map of ADE20K's class numbers -> its colours", read_map, MAPS),
    "hed": Detector(learned.hed, "soft edges of a photograph *"),
    "mlsd": Detector(learned.mlsd, "straight lines in a photograph *"),
    "midas": Detector(learned.midas, "depth in a photograph *"),
    "openpose": Detector(learned.openpose, "poses in a photograph *"),
    "lineart": Detector(learned.lineart, "a photograph as a line drawing *"),
    "sam": Detector(learned.sam, "segments of a photograph, in random colours *"),
}
LEARNED_NOTE = "* learned, by the optional package controlnet_aux (pip install controlnet_aux)"


def detect(name: str, source: Any, **options) -> np.ndarray:
    """A hint, uint8 (H, W, 3), from a photograph, uint8 RGB (H, W, 3), or from what the detector named reads.

    Raises ValueError for an unknown name or option, and for a source or an option's value that it can't work with.
    """
    detector = find_detector(name)
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(f'{name} has no option "{option}", expected {in_words(known)}')
    if detector.works_on_photographs and not is_photograph(source):
        found = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
        raise ValueError(f"{name} works on a picture, uint8 (H, W, 3), found {found}")
    return detector.make(source, **options)


def detect_file(
    name: str, path: str | Path, fit: Callable[[Image.Image], Image.Image] | None = None, **options
) -> np.ndarray:
    """The hint from a file: a picture, or a map or pose file, whatever the detector named reads. Raises ValueError.

    `fit` brings a picture to the size wanted: a photograph before the detector sees it, since what it finds depends on
    the resolution; of other files the hint.
    """
    detector = find_detector(name)
    source = detector.read(Path(path))
    if fit is None:
        return detect(name, source, **options)
    if detector.works_on_photographs:
        return detect(name, np.asarray(fit(Image.fromarray(source))), **options)
    return np.asarray(fit(Image.fromarray(detect(name, source, **options))))


def find_detector(name: str) -> Detector:
    """Raises ValueError if there is none of that name."""
    if name not in DETECTORS:
        raise ValueError(f'there is no detector "{name}", expected {", ".join(DETECTORS)}')
    return DETECTORS[name]


def is_photograph(source: Any) -> bool:
    return isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3


def options_of(name: str) -> dict[str, Any]:
    """The detector's options and their defaults."""
    parameters = inspect.signature(find_detector(name).make).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def parse_options(name: str, texts: Iterable[str]) -> dict[str, Any]:
    """What a command line gives, ["low=50", "high=150"] -> {"low": 50.0, "high": 150.0}. Raises ValueError."""
    defaults, options = options_of(name), {}
    for text in texts:
        option, equals, value = text.partition("=")
        if not equals or option not in defaults:
            raise ValueError(f'{name} has no option "{text}", expected {in_words(defaults)}')
        options[option] = parse_value(option, value, defaults[option])
    return options


def parse_value(option: str, text: str, default: Any) -> Any:
    """The text as a value of the default's type. Raises ValueError."""
    kind, value = type(default), None
    with suppress(ValueError, KeyError):
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    if value is None or (kind is float and not math.isfinite(value)):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f'the option {option} is "{text}", expected {expected}')
    return value


def in_words(options: dict[str, Any]) -> str:
    """The options as one types them, with their defaults."""
    return ", ".join(f"{option}={default}" for option, default in options.items()) or "none"
