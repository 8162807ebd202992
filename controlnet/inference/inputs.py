"""From the options of infer.py to the size, the hints and the ControlNets of images, checked before weights are read.

Sizes are (height, width) in pixels.
"""

import glob
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlnet.checkpoint import TINY_CONTROLS, find_control
from controlnet.common.devices import PRECISIONS
from controlnet.common.image_files import checked_rgb, erased_part, open_image, read_image, read_mask
from controlnet.common.images import Size, fitted, resized, size_text, to_mask, to_uint8
from controlnet.common.program import height_and_width, note
from controlnet.guidance import MODES, Control, check_range, layer_weights
from controlnet.hints import DETECTORS, parse_detector
from controlnet.hints.detectors import IMAGES
from controlnet.hints.hint_image import HintImage
from controlnet.layouts import check_family, recognise_control
from controlnet.model import ControlNet
from ldm.checkpoints.open import open_checkpoint
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion

from .generate import hint_part
from .hint_kind import INVERTED, PHOTOGRAPH, doubt, kind_of, looks_like
from .image_to_image import Init, check_inpainting, steps_done
from .memory import Plan, check_memory
from .options import HintOptions, Options, options_for_each_hint
from .sizes import check_size, default_size
from .upscale import larger_size

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@dataclass(frozen=True)
class CheckedHint:
    """One --hint and all that makes its control, except the ControlNet's weights."""

    options: HintOptions  # with the control's name, also where it was not given
    file: Path
    made: dict[Size, Tensor]  # (1, C, H, W) in [0, 1] for each size of images; not its source, which may be large
    control_file: Path
    mask: Tensor | None

    def files(self) -> dict[str, Path]:
        """All that it is made from, by the names given."""
        mask = self.options.control_mask
        files = {self.options.hint: self.file, self.options.control: self.control_file}
        return files | ({} if mask is None else {mask: Path(mask)})

    def control(self, net: ControlNet, size: Size) -> Control:
        given = self.options
        settings = dict(scale=given.control_scale, start=given.control_start, end=given.control_end, mask=self.mask)
        layers = given.control_layers or ()
        return Control.in_mode(net, self.made[size], given.control_mode, layers, **settings)


def hint_runs(options: Options) -> list[Options]:
    """The options of each run: if one --hint is a folder or a pattern like "poses/*.png", a run for each of its files.

    Raises ValueError for a folder or pattern without files, for several of them, and if --out is where the next run
    would take images for hints.
    """
    files = [files_of(hint.hint, hint.detect, options.out) for hint in options_for_each_hint(options)]
    several = [i for i, found in enumerate(files) if found is not None]
    if not several:
        return [options]
    if len(several) > 1:
        names = " and ".join(f'"{options.hint[i]}"' for i in several)
        raise ValueError(f"{names} are several hints each, expected one --hint at most that is a folder or a pattern")
    i = several[0]
    return [replace(options, hint=[*options.hint[:i], file, *options.hint[i + 1 :]]) for file in files[i]]


def files_of(name: str, detect: str, out: Path) -> list[str] | None:
    """The files in a folder, or of a pattern, that the detector reads; None for the name of one file."""
    path = Path(name)
    if not name.strip():
        raise ValueError("a --hint is empty: give the path of an image, a folder of them or a pattern")
    if path.is_dir():
        found = [str(file) for file in path.iterdir()]
    elif glob.has_magic(name) and not path.exists():
        found = glob.glob(name, recursive=True)
    else:
        return None
    suffixes = {"none": (*IMAGES, ".npy"), "inpaint": IMAGES}.get(detect)
    suffixes = suffixes or DETECTORS[parse_detector(detect)[0]].suffixes
    image = Path(os.path.abspath(out / "0001.png"))
    same = out.resolve() == path.resolve() if path.is_dir() else image.match(os.path.abspath(name))
    if same and ".png" in suffixes:
        raise ValueError(
            f'--out is "{out}", from which --hint "{name}" would the next time take its images for hints: give another '
            "folder"
        )
    visible = (file for file in map(Path, found) if file.is_file() and not file.name.startswith("."))
    files = sorted(str(file) for file in visible if file.suffix.lower() in suffixes)
    if not files:
        raise ValueError(f'there is no file for --detect {detect} in "{name}", expected {", ".join(suffixes)}')
    return files


def read_start(options: Options, config: Config) -> tuple[Image.Image | None, Init | None]:
    """The mask as it is stored, and the image to begin with. Raises ValueError if a file cannot be read, or an
    inpainting base lacks one of them."""
    mask = read_mask(options.mask) if options.mask is not None else None
    init = read_init(options, mask) if options.init is not None else None
    check_inpainting(config, init)
    return mask, init


def read_inputs(
    options: Options, config: Config, device: torch.device, mask: Image.Image | None, init: Init | None, held: int = 0
) -> tuple[Size, list[CheckedHint]]:
    """The size of the images, and their hints. `mask` and `init` come from `read_start`, `held` is for `check_memory`.

    Raises ValueError for a file that is missing, cannot be read or does not fit the base.
    """
    hints = options_for_each_hint(options)
    files = [find_hint(hint.hint) for hint in hints]
    images = [read_hint(hint, file, mask, options) for hint, file in zip(hints, files, strict=True)]
    first = init.part(init.image) if init else images[0].image if images else None
    if options.size:
        size = height_and_width(options.size)
    else:
        with naming(options.init or next(iter(files), None)):
            size = default_size(config, first)
    check_size(config, size)
    largest = larger_size(config, size, options.upscale)
    dtype = PRECISIONS[options.precision]
    check_memory(Plan(config, largest, dtype, len(hints), options.low_memory, options.tile_diffusion), device, held)
    if init and init.mask and options.upscale != 1:
        raise ValueError("--upscale makes all of the image anew, also what a mask keeps: leave one of them out")
    if init:
        note_changes(options.init, init, size)
    given = zip(hints, files, images, strict=True)
    return size, [check_hint(*each, size, largest, config, init) for each in given]


def read_init(options: Options, mask: Image.Image | None) -> Init:
    """Without a mask, what is transparent in the image is the mask."""
    stored = open_image(options.init)
    image = checked_rgb(stored, options.init)
    if mask is not None:
        mask = fit_mask(options.mask, mask, image)
    elif (mask := erased_part(stored)) is not None:
        note(f'a part of "{options.init}" is transparent: it is made anew, as if it were white in a --mask')
    strength = options.strength if options.strength is not None else (1.0 if mask else 0.75)
    return Init(image, strength, mask, options.mask_blur, options.only_masked, options.fit)


def fit_mask(name: str, mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask in the size of the image, with a note if it was resized. One of another shape stays, to be refused."""
    same_shape = abs(math.log(image.width * mask.height / (image.height * mask.width))) < 0.03
    if mask.size == image.size or not same_shape:
        return mask
    found, expected = size_text(mask.size[::-1]), size_text(image.size[::-1])
    note(f'the mask "{name}" is {found}: it is resized to the {expected} of its image')
    return resized(mask, image.size[::-1])


def read_hint(hint: HintOptions, file: Path, mask: Image.Image | None, options: Options) -> HintImage:
    check_range(hint.control_start, hint.control_end)
    if hint.detect != "inpaint":
        return HintImage.of(file, hint.detect, fit=options.fit)
    image = read_image(file)
    with naming(file):
        return HintImage(image, "inpaint", mask=fit_mask(options.mask, mask, image), fit=options.fit)


@contextmanager
def naming(file: str | Path | None) -> Iterator[None]:
    """Puts the file's name before a ValueError that is raised inside: the file may be one of a folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'"{file}": {error}') from error


def check_hint(
    options: HintOptions, file: Path, image: HintImage, size: Size, largest: Size, config: Config, init: Init | None
) -> CheckedHint:
    """Makes the hint at `size`, of the part of `init` that is made, and all of it at `largest`, for the second pass.

    Raises ValueError for what is missing or does not fit the base, CheckpointError for a file without ControlNet.
    """
    part = hint_part(image, size, init)
    note_stretch(options.hint, part.image, size, image.fit)
    layer_weights(options.control_mode, options.control_layers or (), config.unet)
    mask = options.control_mask
    mask = None if mask is None else read_control_mask(mask, size, image.fit, init)
    # The detector runs now, so that its errors come before the weights are read. A hint that needs none is looked at in
    # its own size: thin lines suffer from resizing.
    pixels = np.asarray(image.image) if image.detector is None else to_uint8(part.at(size)[0])
    if options.control is None:
        options = replace(options, control=choose_control(options.hint, pixels, config))
    control_file = find_control(options.control, config.unet)
    checkpoint = open_checkpoint(control_file)
    found = recognise_control(checkpoint)
    check_family(checkpoint, found, config.unet)
    channels = found.config.hint_channels
    with naming(file):
        image.check_channels(channels)
    if image.detector != "inpaint":
        source = None if image.detector is None else np.asarray(image.image)
        if sentence := doubt(options.hint, options.control, pixels, options.detect, source):
            note(sentence)
    made = {size: part.at(size, channels)}
    if largest != size:
        made[largest] = image.at(largest, channels)
    return CheckedHint(options, file, made, control_file, mask)


def read_control_mask(name: str, size: Size, fit: str, init: Init | None) -> Tensor:
    """(1, 1, H, W) in [0, 1], cut to the part of `init` that is made, and 0 where --fit pads."""
    mask = read_mask(name)
    if init and init.only_masked is not None:
        mask = init.part(mask, size)
    note_stretch(name, mask, size, fit)
    return to_mask(fitted(mask, size, fit))


def net_loader(sd: StableDiffusion) -> Callable[[CheckedHint], ControlNet]:
    """-> what loads a hint's ControlNet, once for all hints with the same file; it raises CheckpointError for one that
    does not fit."""
    load = cache(lambda file, pooling: ControlNet.load(file, sd, global_average_pooling=pooling))
    # Files of shuffle models do not say that their residuals are averaged: the mode does.
    return lambda hint: load(hint.control_file, MODES[hint.options.control_mode].averaged or None)


def find_hint(name: str) -> Path:
    """The file, or the example of that name in assets/, with a note."""
    if "://" in name:
        raise ValueError(f'"{name}" is an address, expected a file: download the image first')
    path = Path(name)
    if path.exists() or not (ASSETS / path).is_file():
        return path
    note(f'"{name}" is not in this folder: taking the example in assets/')
    return ASSETS / path


def note_changes(name: str, init: Init, size: Size) -> None:
    """A note if the initial image is distorted or, with a mask, made smaller."""
    if init.only_masked is not None:
        return
    note_stretch(name, init.image, size, init.fit, most=0.03)
    if init.mask and init.image.width * init.image.height > 1.5 * size[0] * size[1]:
        found = size_text(init.image.size[::-1])
        note(f'"{name}" is {found}: the image will be {size_text(size)}; --only-masked keeps its size')


def steps_of(flag: str, strength: float, steps: int) -> int:
    """`steps_done`, with a note if they are none though the strength is above 0."""
    done = steps_done(strength, steps)
    if strength > 0 and not done:
        note(f"{flag} {strength:g} leaves none of the {steps} steps: the image is only resized, raise it or --steps")
    return done


def note_stretch(name: str, image: Image.Image, size: Size, fit: str, most: float = 0.2) -> None:
    """A note if stretching changes the logarithm of the aspect ratio by more than `most`."""
    if fit == "stretch" and abs(math.log(image.width / image.height * size[0] / size[1])) > most:
        found, wanted = size_text(image.size[::-1]), size_text(size)
        note(f'"{name}" is {found}: it is stretched to {wanted}, which --fit crop or pad avoids')


def choose_control(name: str, pixels: np.ndarray, config: Config) -> str:
    """The small ControlNet that a hint, uint8 (H, W, 3) of the file `name`, is for.

    Raises ValueError if the base is not the small one, or the hint does not tell.
    """
    if config.name != "tiny":
        raise ValueError(f'there is no --control for the hint "{name}", expected one --control for each --hint')
    kind = kind_of(pixels)
    if kind is None:
        found = looks_like(pixels)
        detect = {INVERTED: "--detect invert", PHOTOGRAPH: "--detect canny"}.get(found)
        raise ValueError(
            f'"{name}" looks like {found}, which does not tell the small ControlNet that it is for: say --control with '
            f"one of {', '.join(TINY_CONTROLS)}{f', or make a hint of it with {detect}' if detect else ''}"
        )
    note(f'"{name}" is a hint of the kind "{kind}": taking --control {TINY_CONTROLS[kind]}')
    return TINY_CONTROLS[kind]
