"""From the names on a command line to pictures, hints and ControlNets, checked before the weights are read.

Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlnet.common.images import Size, described, read_image, read_mask, resized, to_hints, to_mask, to_uint8
from controlnet.guidance import Control, check_range, guess_layers, middle_layer, residual_levels, resolution_layers
from controlnet.hints import DETECTORS, detect, detect_file, find_detector, inpaint, parse_options
from controlnet.model import ControlNet
from ldm import stable_diffusion
from ldm.checkpoints.checkpoint import open_checkpoint
from ldm.checkpoints.recognise import identify, recognise_control
from ldm.config import Config, UNetConfig
from ldm.samplers import check_eta, timesteps_for
from ldm.schedule import Schedule
from ldm.text_encoder import layers_to_run
from ldm.unet import UNet

from .generate import check_cfg, check_seeds, make_hint
from .hint_kind import TINY_CONTROLS, kind_of
from .png_text import fingerprint

PROMPT_ONLY = ("guess", "resolution", "resolution-literal", "prompt", "shuffle")  # modes that spare the negative prompt

# ---------------------------------------------------------------------------------------------------- the base


def config_of(base: Path, prediction: str | None) -> Config:
    """A base's architecture, without its weights. Raises CheckpointError if it is none."""
    return identify(open_checkpoint(base), prediction).config


def check_sampling(
    config: Config, sampler: str, steps: int, cfg: float, eta: float, seed: int, count: int, clip_skip: int
) -> None:
    """Raises ValueError for what `generate` would refuse."""
    timesteps_for(sampler, Schedule(config.schedule), steps)
    check_cfg(cfg)
    check_eta(sampler, eta)
    check_seeds(seed, count)
    layers_to_run(config.text, clip_skip)


def note_stretch(name: str, image: Image.Image, size: Size, note: Callable[[str], None]) -> None:
    """If the shapes differ by more than rounding does."""
    if abs(math.log(image.width / image.height * size[0] / size[1])) > 0.2:
        note(f'"{name}" is {described(image.size[::-1])}: it is stretched to {described(size)}')


# ---------------------------------------------------------------------------------------------------- hints


@dataclass
class Steering:
    """One --hint of infer.py and the options about it, by their names: `read`, `prepare` and `with_net` make its
    control."""

    hint: str
    detect: str
    control: str | None
    control_scale: float
    control_layers: list[float] | None
    control_start: float
    control_end: float
    control_mask: str | None
    control_mode: str

    def read(self, file: Path) -> None:
        """The picture that the detector works on, or, of a map or a pose, the hint.

        Raises ValueError for a range or a detector that makes no sense and a file that cannot be read.
        """
        check_range(self.control_start, self.control_end)
        name, _, texts = self.detect.partition(":")
        self.detector, self.options = None, {}
        if self.detect not in ("none", "inpaint"):  # which have no options
            self.detector, self.options = name, parse_options(name, texts.split(",") if texts else [])
        self.hint_file = file
        if self.of_photographs():
            check_picture(self.hint, file)
            self.source = read_image(file)
        else:
            self.source = Image.fromarray(detect_file(name, file, **self.options))

    def of_photographs(self) -> bool:
        return self.detector is None or find_detector(self.detector).works_on_photographs

    def comes_as_hint(self) -> bool:
        """Its source needs no detector any more."""
        return self.detector is None or not self.of_photographs()

    def prepare(self, size: Size, mask: Image.Image | None, config: Config, note: Callable[[str], None]) -> None:
        """Hint, mask and layer strengths, and the ControlNet's file; one chosen by the rule of hint_kind.py is noted.

        Raises ValueError for what is missing or does not fit the base, CheckpointError for a file without ControlNet.
        """
        note_stretch(self.hint, self.source, size, note)
        self.hint_tensor = self.made_hint(mask, size)
        self.mask_tensor = to_mask(resized(read_mask(self.control_mask), size)) if self.control_mask else None
        self.layers = layer_strengths(self.control_mode, self.control_layers, config.unet)
        if self.control is None:
            # A hint that was not detected is looked at as it came: thin lines suffer when they are resized.
            pixels = np.asarray(self.source) if self.comes_as_hint() else to_uint8(self.hint_tensor[0])
            self.control = choose_control(self.hint, pixels, config, note)
        self.control_file = find_control(self.control, config)
        channels = recognise_control(open_checkpoint(self.control_file)).config.hint_channels
        self.hint_tensor = in_channels(self.hint_tensor, channels, self.control)

    def made_hint(self, mask: Image.Image | None, size: Size) -> Tensor:
        """(1, 3, H, W) of `size` in [0, 1]; for "inpaint" -1 where the mask is white."""
        if self.detect == "inpaint":
            if mask.size != self.source.size:
                found, expected = described(mask.size[::-1]), described(self.source.size[::-1])
                raise ValueError(f'the mask is {found}, expected {expected}, as the picture "{self.hint}"')
            values = inpaint(np.asarray(resized(self.source, size)), np.asarray(resized(mask, size)))
            return torch.from_numpy(values).permute(2, 0, 1)[None]
        if self.comes_as_hint():
            return make_hint(self.source, size)
        return to_hints([detect(self.detector, np.asarray(resized(self.source, size)), **self.options)])

    def files(self) -> dict[str, Path]:
        """All that it is made from, by the names given."""
        mask = {self.control_mask: Path(self.control_mask)} if self.control_mask else {}
        return {self.hint: self.hint_file, self.control: self.control_file, **mask}

    def pooling(self) -> bool | None:
        """Files of shuffle models do not say that their residuals are averaged over the picture: the mode does."""
        return True if self.control_mode == "shuffle" else None

    def with_net(self, net: ControlNet) -> Control:
        return Control(
            net,
            self.hint_tensor,
            scale=self.control_scale,
            layers=self.layers,
            prompt_only=self.control_mode in PROMPT_ONLY or net.config.global_average_pooling,
            start=self.control_start,
            end=self.control_end,
            mask=self.mask_tensor,
        )


def load_controls(steerings: list[Steering], unet: UNet) -> list[Control]:
    """Hints with the same ControlNet share it. Raises CheckpointError if one does not fit."""
    load = cache(lambda file, pooling: ControlNet.load(file, unet, global_average_pooling=pooling))
    return [steering.with_net(load(steering.control_file, steering.pooling())) for steering in steerings]


def check_picture(name: str, file: Path) -> None:
    """Raises ValueError for a pose or a map, which only the detectors named read."""
    readers = [detector for detector in DETECTORS.values() if file.suffix.lower() in detector.suffixes]
    if readers and not any(detector.works_on_photographs for detector in readers):
        names = " or ".join(name for name, detector in DETECTORS.items() if detector in readers)
        raise ValueError(f'"{name}" is no picture: say with --detect that it is for {names}')


def in_channels(hint: Tensor, channels: int, control: str) -> Tensor:
    """A hint (1, 3, H, W) as a ControlNet wants it: of 3 channels as it is, of 1 in gray. Else raises ValueError."""
    if channels == 3:
        return hint
    if channels == 1:
        gray = Image.fromarray(to_uint8(hint[0])).convert("L")
        return to_hints([np.array(gray)[..., None]])
    raise ValueError(
        f'"{control}" takes hints of {channels} channels, and a picture has 1 or 3: call generate() with a tensor'
    )


# ---------------------------------------------------------------------------------------------------- ControlNets


def choose_control(name: str, pixels: np.ndarray, config: Config, note: Callable[[str], None]) -> str:
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


def find_control(name: str, config: Config) -> Path:
    """A file, or one in weights/ by its name or its short name for this base. Raises ValueError if there is none."""
    weights = stable_diffusion.WEIGHTS
    files = [Path(name), weights / name, *(weights / f"{name}{suffix}" for suffix in (".safetensors", ".pth"))]
    if config.name == "tiny":
        files.append(weights / f"{TINY_CONTROLS.get(name, f'tiny-{name}')}.safetensors")
    else:
        for family in (config.name, f"{config.name}s2"):  # s2: for clip skip 2
            files += sorted(weights.glob(f"control_*{family}_{name}.*"))  # control_v11p_sd15_canny.pth
    for path in files:
        # No other folder that has the name by chance: one of a ControlNet, or of a pipeline, which may hold one.
        if path.is_file() or any((path / file).is_file() for file in ("config.json", "model_index.json")):
            return path
    raise ValueError(f'there is no ControlNet "{name}", neither as a file nor in {weights}: give its path')


def layer_strengths(mode: str, layers: list[float] | None, config: UNetConfig) -> list[float]:
    """Those of a mode times those given. Raises ValueError for another number of them than the base has."""
    of_mode = {
        "guess": guess_layers,
        "resolution": resolution_layers,
        "resolution-literal": lambda config: resolution_layers(config, normalised=False),
        "middle": middle_layer,
    }
    count = len(residual_levels(config))
    if layers and len(layers) != count:
        raise ValueError(f"there are {len(layers)} numbers in --control-layers, expected {count} for this base")
    strengths = of_mode[mode](config) if mode in of_mode else [1.0] * count
    return [a * b for a, b in zip(strengths, layers or [1.0] * count, strict=True)]


# ---------------------------------------------------------------------------------------------------- files


def fingerprints(used: dict[str, Path], recorded: dict[str, str]) -> dict[str, str]:
    """Of each file by the name given. Raises ValueError if one that was recorded is another by now."""
    found = {name: fingerprint(path) for name, path in used.items()}
    for name, value in found.items():
        if recorded.get(name, value) != value:
            raise ValueError(
                f'"{name}" is not the file any more that the picture was made with: give that one by its option, or '
                "leave --again out"
            )
    return found
