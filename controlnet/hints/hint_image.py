"""An image as a hint of any size: from a path, a PIL image or an array, with a detector or without."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from controlnet.common.image_files import Ground, ground_of_hint, mask_of_transparency, read_mask, to_rgb
from controlnet.common.images import Size, fitted, margins, size_text, size_within, to_hints, to_uint8
from controlnet.common.program import FITS

from . import DETECTORS, detect, detect_file, find_detector, inpaint, parse_detector
from .detectors import ground_for
from .hint_file import IMAGE_MODES, open_hint
from .maps import read_map


@dataclass(frozen=True)
class HintImage:
    """An image and the detector that makes a hint of it, at the size of the image that is generated.

    What a detector finds depends on the resolution, so the image is resized before, as `fit` says (`images.fitted`).
    Padding is black or, with "inpaint", made anew. Raises ValueError for "inpaint" without a mask, a mask of another
    size and an unknown `fit`.
    """

    image: Image.Image  # RGB
    detector: str | None = None  # that works on photographs, or "inpaint"; None: the image is the hint
    options: dict[str, Any] = field(default_factory=dict)  # of the detector
    mask: Image.Image | None = None  # for "inpaint": mode L, white is made anew
    fit: str = "stretch"
    layers: tuple[Image.Image, ...] = ()  # mode L: all channels of a hint that is not RGB; `image` then shows some
    made: dict[Size, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # detectors are slow

    def __post_init__(self):
        if self.detector == "inpaint" and self.mask is None:
            raise ValueError('the detector "inpaint" needs a mask: white where the image is to be made anew')
        if self.mask is not None:
            object.__setattr__(self, "mask", as_mask(self.mask, self.image))
        if self.fit not in FITS:
            raise ValueError(f'fit is "{self.fit}", expected one of {", ".join(FITS)}')

    @classmethod
    def of(
        cls,
        image: str | Path | Image.Image | np.ndarray,
        detect: str | None = None,
        mask: Image.Image | None = None,
        fit: str = "stretch",
    ) -> "HintImage":
        """`image` is what `as_stored` takes (with a detector of photographs, not .npy files) or, for one of maps or
        poses, a map or a file of either.

        `detect` is a detector with its options, as in "canny:low=50,high=150"; None or "none" takes the image as it
        is. Raises ValueError for an unknown detector or option and for what the detector cannot read.
        """
        name = (detect or "none").lower()
        if name == "none":
            stored = as_stored(image)
            is_image = isinstance(stored, Image.Image)
            image = to_rgb(stored, ground_of_hint) if is_image else Image.fromarray(in_rgb(stored))
            return cls(image, mask=mask, fit=fit, layers=layers_of(stored))
        if name == "inpaint":
            return cls(as_rgb(image), name, mask=mask, fit=fit)
        name, options = parse_detector(detect)
        if find_detector(name).works_on_photographs:
            return cls(as_rgb(image, ground_for(name)), name, options, fit=fit)
        return cls(Image.fromarray(detected_from_map(name, image, options)), fit=fit)

    def at(self, size: Size, channels: int = 3) -> Tensor:
        """The hint (1, C, H, W) of `size` in [0, 1], in gray for one channel; "inpaint" has -1 where the mask is white.

        Four channels are red, green, blue and opacity. Raises ValueError as `check_channels` does.
        """
        self.check_channels(channels)
        if channels not in (1, 3):
            layers = self.layers or (*self.image.split(), Image.new("L", self.image.size, 255))
            return to_hints([np.dstack([fitted(layer, size, self.fit) for layer in layers])])
        if size not in self.made:
            self.made[size] = self.make(size)
        return self.made[size] if channels == 3 else to_gray(self.made[size])

    def check_channels(self, channels: int) -> None:
        """Raises ValueError if this hint cannot be had in so many channels, those that the ControlNet reads."""
        if self.detector is not None and channels not in ((3,) if self.detector == "inpaint" else (1, 3)):
            raise ValueError(
                f"the ControlNet takes hints of {channels} channels, and the detector {self.detector} makes 3: "
                "give the hint itself"
            )
        found = len(self.layers) or 3
        if found != channels and not {found, channels} <= IMAGE_MODES.keys():
            raise ValueError(
                f"the ControlNet takes hints of {channels} channels, but this one has {found}: an image has 1, 3 or 4; "
                "save others as a .npy array (H, W, C), or pass a tensor to Control()"
            )

    def make(self, size: Size) -> Tensor:
        """The padding is added after the detection, which would find its edges."""
        inner = size_within(self.image, size) if self.fit == "pad" else size
        hint = self.detected(np.array(fitted(self.image, inner, self.fit)), inner)
        top, left = margins(inner, size)
        around = (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top)
        return F.pad(hint, around, value=-1 if self.detector == "inpaint" else 0) if any(around) else hint

    def detected(self, pixels: np.ndarray, size: Size) -> Tensor:
        if self.detector is None:
            return to_hints([pixels])
        if self.detector == "inpaint":
            mask = np.asarray(fitted(self.mask, size, self.fit))
            return to_hints([inpaint(pixels, mask)])
        return to_hints([detect(self.detector, pixels, **self.options)])


def as_mask(mask: str | Path | Image.Image | np.ndarray, image: Image.Image) -> Image.Image:
    """A file, as `read_mask` reads it, or an image or array that `as_stored` takes, in mode L. Raises ValueError and
    TypeError as they do, and ValueError for a mask of another size than the image."""
    if isinstance(mask, str | Path):
        mask = read_mask(mask)
    else:
        mask = mask_of_transparency(stored := as_stored(mask)) or to_rgb(stored).convert("L")
    if mask.size != image.size:
        found, expected = size_text(mask.size[::-1]), size_text(image.size[::-1])
        raise ValueError(f"the mask is {found}, expected the image's {expected}: crop or resize it to that")
    return mask


def to_gray(hint: Tensor) -> Tensor:
    """(1, 3, H, W) -> (1, 1, H, W), in 8 bits."""
    return to_hints([np.array(Image.fromarray(to_uint8(hint[0])).convert("L"))[..., None]])


def as_rgb(image: str | Path | Image.Image | np.ndarray, ground: Ground | None = None) -> Image.Image:
    """What `as_stored` takes, except .npy files, as 8-bit RGB: `to_rgb` with `ground`."""
    if isinstance(image, str | Path):
        check_is_image(image)
    return to_rgb(as_stored(image), ground)


def as_stored(image: str | Path | Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    """A file, as `open_hint` opens it, or a PIL image or an array as an upright image of any mode.

    An array is uint8, or floats in [0, 1], of (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). Raises ValueError for another
    one, for a file that cannot be read (for a pose or a map it names the detectors that do), and for 32 bits a channel,
    TypeError for anything else.
    """
    if isinstance(image, str | Path):
        try:
            return open_hint(image)
        except ValueError:
            if Path(image).exists():
                check_is_image(image)
            raise
    if isinstance(image, np.ndarray):
        return Image.fromarray(to_bytes(image))
    if not isinstance(image, Image.Image):
        raise TypeError(f"the image is of type {type(image).__name__}, expected a path, a PIL image or a NumPy array")
    if image.mode in ("I", "F"):
        raise ValueError(f"the image has 32 bits a channel (mode {image.mode}), expected 8 or 16: convert it first")
    return ImageOps.exif_transpose(image)


def in_rgb(hint: np.ndarray) -> np.ndarray:
    """A hint (H, W, C) as an image (H, W, 3) of its first three channels or, if it has fewer, of their mean. A hole is
    black."""
    hint = to_uint8(to_hints([hint])[0])
    if hint.shape[2] < 3:
        hint = hint.mean(axis=2, keepdims=True).astype(np.uint8).repeat(3, axis=2)
    return np.ascontiguousarray(hint[..., :3])


def layers_of(stored: Image.Image | np.ndarray) -> tuple[Image.Image, ...]:
    """The channels, in mode L, of an array or of an image with opacity: neither fits into RGB."""
    if isinstance(stored, np.ndarray):
        return tuple(Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(stored, 2, 0))
    return stored.convert("RGBA").split() if stored.has_transparency_data else ()


def to_bytes(array: np.ndarray) -> np.ndarray:
    """uint8 (H, W), (H, W, 3) or (H, W, 4) of an array that `as_stored` takes."""
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if pixels.size and (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        if pixels.dtype == np.uint8:
            return pixels
        if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
            return np.rint(255 * pixels.astype(np.float64)).astype(np.uint8)
    range_text = f" from {array.min():g} to {array.max():g}" if array.dtype.kind == "f" and array.size else ""
    raise ValueError(
        f"the array is {array.dtype} {array.shape}{range_text}, expected uint8, or floats from 0 to 1, of (H, W), "
        "(H, W, 1), (H, W, 3) or (H, W, 4)"
    )


def check_is_image(path: str | Path) -> None:
    """Raises ValueError, with the detectors that read it, for the file of a pose or a map."""
    suffix = Path(path).suffix.lower()
    readers = {name: detector for name, detector in DETECTORS.items() if suffix in detector.suffixes}
    if readers and not any(detector.works_on_photographs for detector in readers.values()):
        raise ValueError(
            f'"{path}" is not an image: name the detector that reads it with detect: {" or ".join(readers)}'
        )


def detected_from_map(name: str, source: str | Path | Image.Image | np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """The hint, uint8 (H, W, 3), of a detector that does not work on photographs."""
    if isinstance(source, str | Path):
        return detect_file(name, source, **options)
    if find_detector(name).read is not read_map:
        raise TypeError(f"the detector {name} reads files, found the type {type(source).__name__}: give a path")
    return detect(name, np.asarray(source), **options)
