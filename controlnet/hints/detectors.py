"""The table of detectors, and how they are called: by name, on an image or a file, with options."""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlnet.common.image_files import Ground, ground_of_drawing, read_image

from . import learned
from .filters import blur, canny_hint, gray, invert, scribble, shuffle, threshold_hint, tile
from .maps import depth, normal, read_map, segmentation
from .openpose import pose_hint, read_pose

IMAGES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".ico", ".pcx",
)  # fmt: skip  # the usual names of image_files.FORMATS
MAPS = (".npy", ".npz", *IMAGES)


@dataclass(frozen=True)
class Detector:
    """`make` turns what `read` returns for a file, with options as keywords, into a hint, uint8 (H, W, 3)."""

    make: Callable[..., np.ndarray]
    about: str  # one line for the user
    read: Callable[[Path], Any] = read_image
    suffixes: tuple[str, ...] = IMAGES  # of the files that `read` accepts

    @property
    def works_on_photographs(self) -> bool:
        return self.read is read_image

    @property
    def is_network(self) -> bool:
        return self.make.__module__ == learned.__name__


DETECTORS = {
    "canny": Detector(canny_hint, "edges, one pixel wide (Canny)"),
    "scribble": Detector(scribble, "dark strokes on white paper -> white strokes on black"),
    "threshold": Detector(threshold_hint, "white where the image is bright, black elsewhere"),
    "gray": Detector(gray, "the image without its colours"),
    "invert": Detector(invert, "the negative: black lines on white -> white lines on black"),
    "blur": Detector(blur, "the image without fine detail (Gaussian blur)"),
    "tile": Detector(tile, "the image reduced to an eighth and enlarged again, for tile models"),
    "shuffle": Detector(shuffle, "the image's colours moved to other places, for shuffle models"),
    "pose": Detector(pose_hint, "poses drawn from OpenPose JSON", read_pose, (".json",)),
    "depth": Detector(depth, "a depth map (.npy, .npz, 8- or 16-bit image), near is white", read_map, MAPS),
    "normal": Detector(normal, "a map of surface normals (.npy, .npz or image)", read_map, MAPS),
    "segmentation": Detector(segmentation, "a map of ADE20K class numbers -> the classes' colours", read_map, MAPS),
    "hed": Detector(learned.hed, "soft edges of a photograph *"),
    "mlsd": Detector(learned.mlsd, "straight lines in a photograph *"),
    "midas": Detector(learned.midas, "depth in a photograph *"),
    "openpose": Detector(learned.openpose, "poses in a photograph *"),
    "lineart": Detector(learned.lineart, "a photograph as a line drawing *"),
    "sam": Detector(learned.sam, "segments of a photograph, in random colours *"),
}
OF_STROKES = {"scribble", "threshold", "invert"}  # of drawings, which may have a transparent ground
LEARNED_NOTE = "* learned, by the optional package controlnet_aux (pip install controlnet_aux)"

# Other programs' names for these, in lower case. For networks that we lack, one for the same kind of hint stands in.
OTHER_NAMES = {
    "canny": "canny_edge",
    "gray": "grayscale greyscale grey",
    "blur": "blur_gaussian",
    "tile": "tile_resample",
    "normal": "normalmap normal_map normal_bae normalbae normal_midas",
    "segmentation": "seg seg_ofade20k seg_ufade20k oneformer_ade20k",
    "hed": "softedge softedge_hed softedge_hedsafe softedge_pidinet softedge_pidisafe pidinet pidinet_safe hed_safe "
    "scribble_hed scribble_pidinet",
    "midas": "depth_midas depth_leres depth_leres++ depth_zoe depth_anything depth_anything_v2 leres zoe",
    "openpose:hands=true": "openpose_hand",
    "openpose:face=true": "openpose_face openpose_faceonly",
    "openpose:hands=true,face=true": "openpose_full dw_openpose_full dwpose",
    "lineart": "lineart_realistic lineart_standard lineart_anime lineart_anime_denoise",
    "lineart:coarse=true": "lineart_coarse",
    "sam": "segment_anything",
}
ALIASES = {other: ours for ours, others in OTHER_NAMES.items() for other in others.split()}


def detect(name: str, source: Any, **options) -> np.ndarray:
    """A hint, uint8 (H, W, 3), from a photograph, uint8 RGB (H, W, 3), or from whatever else the detector reads.

    Raises ValueError for an unknown name or option, and for a source or a value that the detector does not accept.
    """
    detector = find_detector(name)
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(f'{name} has no option "{option}", expected {options_text(known)}')
    is_rgb = isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,)
    if detector.works_on_photographs and not is_rgb:
        found = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
        raise ValueError(f"{name} works on an image, uint8 (H, W, 3), found {found}")
    return detector.make(source, **options)


def detect_file(
    name: str, path: str | Path, fit: Callable[[Image.Image], Image.Image] | None = None, **options
) -> np.ndarray:
    """The hint from an image, map or pose file, whichever the detector reads. Raises ValueError.

    `fit` resizes a photograph before the detection, which depends on the resolution, and of other files the hint.
    """
    detector = find_detector(name)
    if detector.works_on_photographs:
        source = read_image(path, ground_for(name))
        return detect(name, np.asarray(fit(source) if fit else source), **options)
    hint = detect(name, detector.read(Path(path)), **options)
    return np.asarray(fit(Image.fromarray(hint))) if fit else hint


def find_detector(name: str) -> Detector:
    """Raises ValueError if there is no detector of that name."""
    if name not in DETECTORS:
        raise ValueError(f'there is no detector "{name}", expected {", ".join(DETECTORS)}')
    return DETECTORS[name]


def ground_for(name: str) -> Ground | None:
    """What a detector is to see behind transparent parts, for `to_rgb`."""
    return ground_of_drawing if name in OF_STROKES else None


def options_of(name: str) -> dict[str, Any]:
    """The detector's options and their defaults."""
    parameters = inspect.signature(find_detector(name).make).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def options_text(options: dict[str, Any]) -> str:
    """The options and their values as one types them."""
    return ", ".join(f"{option}={default}" for option, default in options.items()) or "none"


def parse_detector(text: str) -> tuple[str, dict[str, Any]]:
    """ "canny:low=50" -> ("canny", {"low": 50.0}), in any case; also by the names in `ALIASES`. Raises ValueError."""
    name, _, options = text.partition(":")
    name, _, implied = ALIASES.get(name.lower(), name.lower()).partition(":")
    return name, parse_options(name, [*filter(None, implied.split(",")), *filter(None, options.split(","))])


def parse_options(name: str, texts: Iterable[str]) -> dict[str, Any]:
    """From the command line: ["low=50", "high=150"] -> {"low": 50.0, "high": 150.0}. Raises ValueError."""
    defaults, options = options_of(name), {}
    for text in texts:
        option, equals, value = text.partition("=")
        if not equals or option not in defaults:
            raise ValueError(f'{name} has no option "{text}", expected {options_text(defaults)}')
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
