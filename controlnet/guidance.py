"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) with any number of ControlNets.

`guided` turns a UNet, two prompts and some controls into the denoiser that the samplers call at each step. What a
control is, and in which mode it acts, follows below it.

Shapes: B batch, H W pixels, h = H/8, w = W/8, M prompt tokens, D context width; x (B, 4, h, w), t (B,),
contexts (B, M, D).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from controlnet.hints.hint_image import HintImage
from ldm.config import UNetConfig
from ldm.samplers import Denoise
from ldm.unet import UNet

from .model import ControlNet

# The part of the guidance that a batch belongs to; in "both" its first half is the negative prompt's.
Branch = Literal["negative", "prompt", "both"]


# ------------------------------------------------------------------------------------------------------ the guided step


def guided(
    unet: UNet,
    prompt: Tensor,
    negative: Tensor,
    cfg: float,
    controls: Sequence["Control"] = (),
    timesteps: Sequence[float] | None = None,
    batched: bool = True,
    make_predictor: Callable[[UNet], "Predict"] | None = None,
) -> Denoise:
    """-> denoise(x, t): the UNet's raw output, eps or v, extrapolated from the negative prompt's by the scale `cfg`,
    in the paper's symbols eps_uc + beta_cfg (eps_c - eps_uc) (arXiv 2302.05543v3, section 3.4).

    At cfg 1 the negative prompt has no effect and is not computed. Otherwise both branches are one batch of twice the
    size, or two evaluations if not `batched`: the same result in less memory. `timesteps` are those that will be
    sampled: only controls that act in a part of the steps need them. `make_predictor` gives what computes the UNet with
    its controls: `exact` by default, or reuse.py's faster, approximate one.

    Raises ValueError if `timesteps` are needed and missing; `denoise` raises it if there are several hints or masks,
    but not one for each sample of x.
    """
    prepared = [PreparedControl(control, timesteps) for control in controls]
    make_predictor = make_predictor or exact
    predict, predict_negative = make_predictor(unet), make_predictor(unet)  # reuse.py's keeps its branch's features

    def denoise(x: Tensor, t: Tensor, timestep: float | None = None) -> Tensor:
        timestep = t[0].item() if timestep is None else timestep  # .item() waits for the GPU
        acting = [control for control in prepared if control.acts(timestep)]
        for control in acting:
            control.check_batch(len(x))
        if cfg == 1:
            return predict(x, t, timestep, prompt, acting, "prompt")
        if batched:
            contexts = torch.cat([negative, prompt])  # (2 B, M, D)
            outputs = predict(x.repeat(2, 1, 1, 1), t.repeat(2), timestep, contexts, acting, "both")  # (2 B, 4, h, w)
            negative_output, prompt_output = outputs.chunk(2)
        else:
            negative_output = predict_negative(x, t, timestep, negative, acting, "negative")
            prompt_output = predict(x, t, timestep, prompt, acting, "prompt")
        return negative_output + cfg * (prompt_output - negative_output)

    return denoise


# predict(x, t, timestep, context, controls, branch) -> the UNet's output (B, 4, h, w), the controls' residuals added
Predict = Callable[[Tensor, Tensor, float, Tensor, Sequence["PreparedControl"], Branch], Tensor]


def exact(unet: UNet) -> Predict:
    return lambda x, t, timestep, context, controls, branch: controlled(unet, x, t, context, controls, branch)


def controlled(
    unet: UNet, x: Tensor, t: Tensor, context: Tensor, controls: Sequence["PreparedControl"], branch: Branch
) -> Tensor:
    """The UNet's output with the controls' residuals added: all that a step computes with networks."""
    return unet(x, t, context, total_residuals(x, t, context, controls, branch))


def total_residuals(
    x: Tensor, t: Tensor, context: Tensor, controls: Iterable["PreparedControl"], branch: Branch
) -> list[Tensor] | None:
    """The sum over all controls, residual by residual (arXiv 2302.05543v3, section 3.4, Figure 6); None without any."""
    each = [control.residuals(x, t, context, branch) for control in controls if control.acts_in(branch)]
    return [sum(residuals[1:], residuals[0]) for residuals in zip(*each, strict=True)] or None


# -------------------------------------------------------------------------------------------------------------- control


@dataclass(frozen=True)
class Control:
    """One ControlNet in use: its hint, and how strongly, where, when and in which branch its residuals are added.

    Raises TypeError for a network, hint or mask of another kind, ValueError for a hint of another shape or of whole
    numbers, another number of layer weights than it has residuals, or a range outside 0 <= start < end <= 1.
    """

    net: ControlNet
    hint: Tensor | HintImage  # (1 or B, 3, H, W) in [0, 1], or what `generate` makes it from
    scale: float = 1.0
    layers: Sequence[float] = ()  # a weight for each residual, times `scale`; none: all 1
    prompt_only: bool = False  # does not act on the negative prompt's branch
    start: float = 0.0  # acts from here to `end`, as fractions of the steps
    end: float = 1.0
    mask: Tensor | None = None  # (1 or B, 1, H, W) in [0, 1]: where in the image it acts; None: everywhere

    def __post_init__(self):
        check_net(self.net)
        check_type("a hint", self.hint, Tensor | HintImage, "a tensor: for images there is Control.from_image")
        check_type(
            "a control's mask", self.mask, Tensor | None, "a tensor (1, 1, H, W): common.images.to_mask makes one"
        )
        channels = self.net.config.hint_channels
        if isinstance(self.hint, HintImage):
            self.hint.check_channels(channels)
        elif self.hint.ndim != 4 or self.hint.shape[1] != channels:
            raise ValueError(f"a hint has the shape {tuple(self.hint.shape)}, expected (1, {channels}, H, W) in [0, 1]")
        elif not self.hint.is_floating_point():
            raise ValueError(f"a hint is of {self.hint.dtype}, expected floats in [0, 1]: divide bytes by 255")
        expected = len(self.net.zero_convs) + 1
        if len(self.layers) not in (0, expected):
            raise ValueError(f"a control has {len(self.layers)} layer weights, expected {expected} for this base")
        check_range(self.start, self.end)

    @classmethod
    def from_image(
        cls,
        net: ControlNet,
        image: str | Path | Image.Image | np.ndarray | HintImage,
        *,
        detect: str | None = None,
        **settings: Any,
    ) -> "Control":
        """A control whose hint is made from an image, at the size of the image that is generated.

        `image` is a path, a PIL image or an array, uint8 or floats in [0, 1]; `detect` is a detector with its options,
        as in "canny:low=50,high=150", and None if the image is the hint itself (controlnet/hints/hint_image.py).
        `settings` are those of `in_mode`.

        Raises ValueError for an unknown detector, an image that cannot be read and as `in_mode` does.
        """
        hint = image if isinstance(image, HintImage) else HintImage.of(image, detect)
        return cls.in_mode(net, hint, **settings)

    @classmethod
    def in_mode(
        cls,
        net: ControlNet,
        hint: Tensor | HintImage,
        mode: str = "balanced",
        layers: Sequence[float] = (),
        **settings: Any,
    ) -> "Control":
        """A control with the weights of `mode`, one of `MODES`, times `layers`. `settings` are the other fields.

        Raises ValueError for an unknown mode and as `Control` does.
        """
        check_net(net)
        weights = layer_weights(mode, layers, net.encoder.config)
        if MODES[mode].averaged and not net.config.global_average_pooling:
            raise ValueError(f'the mode is "{mode}": load its ControlNet with global_average_pooling=True')
        prompt_only = MODES[mode].prompt_only or net.config.global_average_pooling
        return cls(net, hint, **{"layers": weights, "prompt_only": prompt_only, **settings})

    def of_images(self, images: slice) -> "Control":
        """For some of B images: where there is a hint or a mask for each, theirs."""
        hint, mask = (
            every[images] if isinstance(every, Tensor) and len(every) > 1 else every for every in (self.hint, self.mask)
        )
        return replace(self, hint=hint, mask=mask)


def check_type(what: str, value: Any, types: type | UnionType, expected: str) -> None:
    """Raises TypeError for a value of other types."""
    if not isinstance(value, types):
        raise TypeError(f"{what} is of type {type(value).__name__}, expected {expected}")


def check_net(net: ControlNet) -> None:
    check_type("a control's network", net, ControlNet, "a ControlNet: ControlNet.load(path_or_name, sd) loads one")


def check_range(start: float, end: float) -> None:
    """Raises ValueError for what is not a range of fractions of the steps."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"a control acts from {start} to {end} of the steps, expected 0 <= start < end <= 1")


class PreparedControl:
    """A control with what is constant during the sampling computed once: hint features, masks and its timesteps."""

    def __init__(self, control: Control, timesteps: Sequence[float] | None = None):
        self.control = control
        # The prompt's keys and values are constant, too, but only 0.4 % of the arithmetic: not worth keeping.
        self.hint_features = control.net.hint_encoder(control.hint)  # (1 or B, C, h, w)
        levels = residual_levels(control.net.encoder.config)
        self.weights = [control.scale * weight for weight in control.layers or [1.0] * len(levels)]
        self.masks = None
        if control.mask is not None:
            by_level = masks_by_level(control.mask, self.hint_features.shape[-2:], max(levels))
            self.masks = [by_level[level] for level in levels]
        self.timesteps = None  # all
        if (control.start, control.end) != (0, 1):
            if timesteps is None:
                raise ValueError("a control acts in a part of the steps: pass the argument timesteps")
            self.timesteps = acting_timesteps(timesteps, control.start, control.end)

    def check_batch(self, count: int) -> None:
        for what, given in (("hints", self.control.hint), ("masks", self.control.mask)):
            if given is not None and len(given) not in (1, count):
                raise ValueError(
                    f"there are {len(given)} {what} of a control for a batch of {count}, expected 1 or {count}"
                )

    def acts(self, timestep: float) -> bool:
        return self.timesteps is None or self.timesteps[0] >= timestep > self.timesteps[1]

    def acts_in(self, branch: Branch) -> bool:
        return not (self.control.prompt_only and branch == "negative")

    def residuals(self, x: Tensor, t: Tensor, context: Tensor, branch: Branch) -> list[Tensor]:
        """One (B, C, h, w) for each skip in the encoder's order, the middle's last."""
        if self.control.prompt_only and branch == "both":
            x, t, context = (both.chunk(2)[1] for both in (x, t, context))
            return [torch.cat([torch.zeros_like(r), r]) for r in self.residuals(x, t, context, "prompt")]
        net = self.control.net
        latents = x[:, : net.encoder.config.input_channels]  # of what an inpainting base reads
        residuals = net.residuals(latents, t, context, fill_batch(self.hint_features, len(x)))
        residuals = [r if weight == 1 else weight * r for weight, r in zip(self.weights, residuals, strict=True)]
        if self.masks is None:
            return residuals
        return [fill_batch(mask, len(x)) * r for mask, r in zip(self.masks, residuals, strict=True)]


def acting_timesteps(timesteps: Sequence[float], start: float, end: float) -> tuple[float, float]:
    """The timestep from which a control acts, and the one at which it no longer does: some samplers evaluate the UNet
    between those of their steps, too."""
    ends = [*timesteps, -1]  # step i goes from ends[i] to ends[i + 1]
    steps = acting_steps(len(timesteps), start, end)
    return (ends[steps[0]], ends[steps[-1] + 1]) if steps else (-1, -1)


def acting_steps(n: int, start: float, end: float) -> list[int]:
    """Those of n steps that lie within `start` to `end`; step i goes from i / n to (i + 1) / n."""
    return [i for i in range(n) if start <= i / n and (i + 1) / n <= end]


def masks_by_level(mask: Tensor, size: tuple[int, int], last: int) -> list[Tensor]:
    """A mask (B, 1, H, W) averaged over the area of each position, at the levels 0, of `size`, to `last`."""
    sizes = [tuple(-(-side // 2**level) for side in size) for level in range(last + 1)]  # halved and rounded up
    return [F.interpolate(mask, size, mode="area") for size in sizes]


def fill_batch(features: Tensor, count: int) -> Tensor:
    """(1 or B, C, h, w) -> (1 or count, C, h, w): a batch of one is left to broadcasting."""
    return features if len(features) == 1 else features.repeat(count // len(features), 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------- modes


def residual_levels(config: UNetConfig) -> list[int]:
    """The level of each residual, 0 the finest: SD's are 0 0 0 1 1 1 2 2 2 3 3 3 and the middle's 3."""
    last = len(config.multipliers) - 1
    levels = [0]
    for level in range(last + 1):
        levels += [level] * config.blocks + [level + 1] * (level < last)
    return [*levels, last]


def equal_weights(levels: list[int]) -> list[float]:
    return [1.0] * len(levels)


def guess_weights(levels: list[int]) -> list[float]:
    """0.825^(12 - i) for residual i: the earlier the block, the weaker (the released code's guess mode)."""
    return [0.825**i for i in reversed(range(len(levels)))]


def literal_resolution_weights(levels: list[int]) -> list[float]:
    """CFG resolution weighting (arXiv 2302.05543, section 3.4, Figure 5), w_i = 64 / h_i for a block of side h_i, read
    literally: 1 to 8. The base has never seen residuals of eight times their strength: images break."""
    return [2.0**level for level in levels]


def resolution_weights(levels: list[int]) -> list[float]:
    """`literal_resolution_weights` divided by the largest: 1/8 to 1, close to the released code's 0.825^(12 - i)."""
    return [2.0 ** (level - max(levels)) for level in levels]


def middle_weights(levels: list[int]) -> list[float]:
    """The middle's residual alone: the released code's `only_mid_control`."""
    return [0.0] * (len(levels) - 1) + [1.0]


@dataclass(frozen=True)
class Mode:
    """How a control acts, besides its scale, range and mask."""

    weights: Callable[[list[int]], list[float]] = equal_weights  # of residuals, by their levels
    prompt_only: bool = False
    averaged: bool = False  # over all positions (`ControlConfig.global_average_pooling`), whatever the file says


MODES = {
    "balanced": Mode(),
    "prompt": Mode(prompt_only=True),
    "guess": Mode(guess_weights, prompt_only=True),
    "resolution": Mode(resolution_weights, prompt_only=True),
    "resolution-literal": Mode(literal_resolution_weights, prompt_only=True),
    "middle": Mode(middle_weights),
    "shuffle": Mode(prompt_only=True, averaged=True),
}


def layer_weights(mode: str, layers: Sequence[float], config: UNetConfig) -> list[float]:
    """Those of a mode times `layers`, if there are any. Raises ValueError for an unknown mode or another number."""
    if mode not in MODES:
        raise ValueError(f'the mode of a control is "{mode}", expected one of {", ".join(MODES)}')
    weights = MODES[mode].weights(residual_levels(config))
    if len(layers) not in (0, len(weights)):
        raise ValueError(f"a control has {len(layers)} layer weights, expected {len(weights)} for this base")
    return [a * b for a, b in zip(weights, layers, strict=True)] if layers else weights
