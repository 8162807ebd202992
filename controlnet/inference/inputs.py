"""From the options of infer.py to an image's size, its hints and its ControlNets, checked before weights are read.

Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from controlnet.checkpoint import TINY_CONTROLS, find_control
from controlnet.common.image_files import read_image, read_mask
from controlnet.common.images import Size, resized, size_text, to_mask, to_uint8
from controlnet.common.program import height_and_width, note
from controlnet.guidance import MODES, Control, check_range, layer_weights
from controlnet.hints.hint_image import HintImage, check_channels
from controlnet.layouts import recognise_control
from controlnet.model import ControlNet
from ldm.checkpoints.open import open_checkpoint
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion

from .generate import check_size, default_size
from .hint_kind import kind_of
from .image_to_image import Init
from .options import HintOptions, Options, options_for_each_hint

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@dataclass(frozen=True)
class CheckedHint:
    """One --hint and all that makes its control but the ControlNet's weights."""

    options: HintOptions  # with the control's name, also where it was not given
    file: Path
    image: HintImage
    control_file: Path
    mask: Tensor | None

    def files(self) -> dict[str, Path]:
        """All that it is made from, by the names given."""
        mask = self.options.control_mask
        files = {self.options.hint: self.file, self.options.control: self.control_file}
        return files | ({mask: Path(mask)} if mask else {})

    def control(self, net: ControlNet) -> Control:
        given = self.options
        settings = dict(scale=given.control_scale, start=given.control_start, end=given.control_end, mask=self.mask)
        layers = given.control_layers or ()
        return Control.from_image(net, self.image, mode=given.control_mode, layers=layers, **settings)


def read_inputs(options: Options, config: Config) -> tuple[Size, Init | None, list[CheckedHint]]:
    """Raises ValueError for what is missing, cannot be read or does not fit the base."""
    init = read_image(options.init) if options.init else None
    mask = read_mask(options.mask) if options.mask else None
    hints = options_for_each_hint(options)
    files = [find_hint(hint.hint) for hint in hints]
    images = [read_hint(hint, file, mask) for hint, file in zip(hints, files, strict=True)]
    named = [(options.init, init)] if init else []
    named += [(hint.hint, image.image) for hint, image in zip(hints, images, strict=True)]
    size = height_and_width(options.size) if options.size else default_size(config, named[0][1] if named else None)
    check_size(config, size)
    for name, image in named:
        note_stretch(name, image, size)
    strength = options.strength if options.strength is not None else (1.0 if mask else 0.75)
    checked = [check_hint(*each, size, config) for each in zip(hints, files, images, strict=True)]
    return size, init and Init(init, strength, mask), checked


def read_hint(options: HintOptions, file: Path, mask: Image.Image | None) -> HintImage:
    check_range(options.control_start, options.control_end)
    return HintImage.of(file, options.detect, mask if options.detect == "inpaint" else None)


def check_hint(options: HintOptions, file: Path, image: HintImage, size: Size, config: Config) -> CheckedHint:
    """Raises ValueError for what is missing or does not fit the base, CheckpointError for a file without ControlNet."""
    layer_weights(options.control_mode, options.control_layers or (), config.unet)
    mask = to_mask(resized(read_mask(options.control_mask), size)) if options.control_mask else None
    hint = image.at(size)  # a detector's errors come before the weights are read
    if options.control is None:
        # A hint that was not detected is looked at as it came: thin lines suffer when they are resized.
        pixels = np.asarray(image.image) if image.detector is None else to_uint8(hint[0])
        options = replace(options, control=choose_control(options.hint, pixels, config))
    control_file = find_control(options.control, config.unet)
    check_channels(recognise_control(open_checkpoint(control_file)).config.hint_channels)
    return CheckedHint(options, file, image, control_file, mask)


def load_controls(hints: Sequence[CheckedHint], sd: StableDiffusion) -> list[Control]:
    """Hints with the same ControlNet share it. Raises CheckpointError if one does not fit."""
    load = cache(lambda file, pooling: ControlNet.load(file, sd, global_average_pooling=pooling))
    # Files of shuffle models do not say that their residuals are averaged: the mode does.
    pooling = [True if MODES[hint.options.control_mode].averaged else None for hint in hints]
    return [hint.control(load(hint.control_file, pooled)) for hint, pooled in zip(hints, pooling, strict=True)]


def find_hint(name: str) -> Path:
    """The file, or the example of that name in assets/, with a note."""
    path = Path(name)
    if path.exists() or not (ASSETS / path).is_file():
        return path
    note(f'"{name}" is not in this folder: taking the example in assets/')
    return ASSETS / path


def note_stretch(name: str, image: Image.Image, size: Size) -> None:
    """A note if the aspect ratios differ by more than rounding does."""
    if abs(math.log(image.width / image.height * size[0] / size[1])) > 0.2:
        note(f'"{name}" is {size_text(image.size[::-1])}: it is stretched to {size_text(size)}')


def choose_control(name: str, pixels: np.ndarray, config: Config) -> str:
    """Which ControlNet a hint, uint8 (H, W, 3), is for; `name` is its file's.

    Raises ValueError if the base is not the small one, or the hint does not tell.
    """
    if config.name != "tiny":
        raise ValueError(f'there is no --control for the hint "{name}", expected one --control for each --hint')
    kind = kind_of(pixels)
    if kind is None:
        raise ValueError(
            f'"{name}" does not tell which of the small ControlNets it is for: say --control with one of '
            f"{', '.join(TINY_CONTROLS)}, or make a hint of it with --detect"
        )
    note(f'"{name}" is a hint of the kind "{kind}": taking --control {TINY_CONTROLS[kind]}')
    return TINY_CONTROLS[kind]
