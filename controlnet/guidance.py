"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) with ControlNets: one denoiser for the samplers.

Shapes: B batch, H W pixels, h = H/8, w = W/8; x (B, 4, h, w), t (B,), contexts (B, M, D).

A control has one strength for each of its residuals: the skips in the encoder's order, the middle last, 13 in SD.
`guess_layers`, `resolution_layers` and `middle_layer` are the strengths of the paper and of the released code.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import UNetConfig
from ldm.unet import UNet

from .model import ControlNet
from .reuse import Reusing, check_reuse, in_full


@dataclass(frozen=True)
class Control:
    """One ControlNet in use: its hint, and how strongly, where, when and in which branch its residuals are added.

    Raises ValueError for a hint of another shape, another number of layer strengths than it has residuals, or a range
    outside 0 <= start < end <= 1.
    """

    net: ControlNet
    hint: Tensor  # (1 or B, 3, H, W) in [0, 1]
    scale: float = 1.0
    layers: Sequence[float] = ()  # a strength for each residual, times `scale`; none: all 1
    prompt_only: bool = False  # not in the negative prompt's branch of the guidance (as shuffle models want it)
    start: float = 0.0  # the part of the steps in which it acts
    end: float = 1.0
    mask: Tensor | None = None  # (1 or B, 1, H, W) in [0, 1]: where in the picture it acts; None: everywhere

    def __post_init__(self):
        channels = self.net.config.hint_channels
        if self.hint.ndim != 4 or self.hint.shape[1] != channels:
            raise ValueError(f"a hint has the shape {tuple(self.hint.shape)}, expected (1, {channels}, H, W) in [0, 1]")
        expected = len(self.net.zero_convs) + 1
        if len(self.layers) not in (0, expected):
            raise ValueError(f"a control has {len(self.layers)} layer strengths, expected {expected} for this base")
        check_range(self.start, self.end)


def check_range(start: float, end: float) -> None:
    """Raises ValueError for what is no part of the steps."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"a control acts from {start} to {end} of the steps, expected 0 <= start < end <= 1")


# ---------------------------------------------------------------------------------------------------- layer strengths


def residual_levels(config: UNetConfig) -> list[int]:
    """The level of each residual, 0 the finest: SD's are 0 0 0 1 1 1 2 2 2 3 3 3 and the middle's 3."""
    last = len(config.multipliers) - 1
    levels = [0]
    for level in range(last + 1):
        levels += [level] * config.blocks + [level + 1] * (level < last)
    return [*levels, last]


def guess_layers(config: UNetConfig) -> list[float]:
    """0.825^(12 - i) for residual i: weaker the earlier the block. The strengths of the released code's guess mode, in
    which the control also acts in the prompt's branch alone (`prompt_only`)."""
    last = len(residual_levels(config)) - 1
    return [0.825 ** (last - i) for i in range(last + 1)]


def resolution_layers(config: UNetConfig, normalised: bool = True) -> list[float]:
    """Classifier-free guidance resolution weighting (arXiv 2302.05543v3, section 3.4): w_i = 64 / h_i, where h_i is the
    side of block i in a picture of 512 pixels, 64 to 8; with it the control acts in the prompt's branch alone.

    Read literally the finest residuals keep their strength and the coarsest get 8 times theirs, which the base has
    never seen: pictures break. Normalised, each is divided by that 8: the coarsest keep their strength, the finest get
    an eighth, close to the 0.825^(12 - i) of the released code. A UNet of fewer levels is divided by its own largest.
    """
    weights = [2.0**level for level in residual_levels(config)]
    return [w / max(weights) for w in weights] if normalised else weights


def middle_layer(config: UNetConfig) -> list[float]:
    """The middle's residual alone: the released code's `only_mid_control`."""
    return [0.0] * (len(residual_levels(config)) - 1) + [1.0]


# ---------------------------------------------------------------------------------------------------- guidance


def guided(
    unet: UNet,
    prompt: Tensor,
    negative: Tensor,
    cfg: float,
    controls: Sequence[Control] = (),
    timesteps: Sequence[int] | None = None,
    batched: bool = True,
    reuse: int = 1,
) -> Callable[[Tensor, Tensor], Tensor]:
    """-> denoise(x, t): the raw output, moved away from the negative prompt's by the factor `cfg`.

    output = negative + cfg (prompt - negative); at cfg 1 the negative prompt has no effect and is not computed. The
    guidance acts on the raw output, whether that is eps or v. Both branches are one batch of twice the size, or two
    evaluations if not `batched`: equal results, less memory. With `reuse` N only every Nth step is computed in full,
    and each at which other controls begin to act: an approximation, see reuse.py. `timesteps` are those of the
    sampling, in its order; only `reuse` and controls with a `start` or an `end` need them, and then all of t is the
    same. Raises ValueError if they are missing, or for a `reuse` below 1.
    """
    check_reuse(reuse)
    # A hint does not change from step to step: encoded once. Nor do the prompt's keys and values in the transformers,
    # but they are 0.4 % of the UNet's arithmetic in SD at 512x512: keeping them would not pay.
    uses = [Use(control, timesteps) for control in controls]
    if reuse == 1:
        of_both = of_negative = of_prompt = in_full(unet)
    else:
        spans = constant_spans(uses, timesteps)
        of_both, of_negative, of_prompt = (Reusing(unet, spans, reuse) for _ in range(3))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        acting = [use for use in uses if use.acts(t[0])]
        in_negative = [use for use in acting if not use.control.prompt_only]
        if cfg == 1:
            return of_prompt(x, t, prompt, lambda: total(use.residuals(x, t, prompt) for use in acting))
        if batched:
            x, t, context = x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([negative, prompt])  # (2 B, ...)
            output = of_both(x, t, context, lambda: total(use.residuals_of_both(x, t, context) for use in acting))
            negative_output, prompt_output = output.chunk(2)
        else:
            negative_output = of_negative(
                x, t, negative, lambda: total(use.residuals(x, t, negative) for use in in_negative)
            )
            prompt_output = of_prompt(x, t, prompt, lambda: total(use.residuals(x, t, prompt) for use in acting))
        return negative_output + cfg * (prompt_output - negative_output)

    return denoise


class Use:
    """A control with all that stays the same from step to step: hint features, masks, and the timesteps it acts at."""

    def __init__(self, control: Control, timesteps: Sequence[int] | None):
        self.control = control
        self.features = control.net.hint_encoder(control.hint)  # (1 or B, C, h, w)
        levels = residual_levels(control.net.encoder.config)
        self.strengths = [control.scale * layer for layer in control.layers or [1.0] * len(levels)]
        if control.mask is not None:
            masks = shrunk(control.mask, self.features.shape[-2:], max(levels))
            self.masks = [masks[level] for level in levels]
        self.timesteps = None  # all
        if (control.start, control.end) != (0, 1):
            if timesteps is None:
                raise ValueError("a control acts in a part of the steps: pass the argument timesteps")
            self.timesteps = acting_timesteps(timesteps, control.start, control.end)

    def acts(self, timestep: Tensor | int) -> bool:
        return self.timesteps is None or int(timestep) in self.timesteps  # on CUDA int waits for the device

    def residuals(self, x: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        residuals = self.control.net.residuals(x, t, context, fill_batch(self.features, len(x)))
        residuals = [
            r if strength == 1 else strength * r for strength, r in zip(self.strengths, residuals, strict=True)
        ]
        if self.control.mask is None:
            return residuals
        return [fill_batch(mask, len(x)) * r for mask, r in zip(self.masks, residuals, strict=True)]

    def residuals_of_both(self, x: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
        """For a batch whose first half is the negative prompt's."""
        if not self.control.prompt_only:
            return self.residuals(x, t, context)
        in_prompt = self.residuals(*(both.chunk(2)[1] for both in (x, t, context)))
        return [torch.cat([torch.zeros_like(r), r]) for r in in_prompt]


def acting_timesteps(timesteps: Sequence[int], start: float, end: float) -> set[int]:
    """Those of the steps, step i of n being from i / n to (i + 1) / n, that lie within `start` to `end`."""
    n = len(timesteps)
    return {t for i, t in enumerate(timesteps) if start <= i / n and (i + 1) / n <= end}


def constant_spans(uses: Sequence[Use], timesteps: Sequence[int] | None) -> list[list[int]]:
    """The timesteps, cut where other controls begin to act. Raises ValueError without timesteps."""
    if timesteps is None:
        raise ValueError("features are reused from step to step: pass the argument timesteps")
    return [list(span) for _, span in groupby(timesteps, lambda timestep: [use.acts(timestep) for use in uses])]


def shrunk(mask: Tensor, size: tuple[int, int], last: int) -> list[Tensor]:
    """A mask (B, 1, H, W) as the mean over the area of each position, at the levels 0, of `size`, to `last`."""
    sizes = [tuple(-(-side // 2**level) for side in size) for level in range(last + 1)]  # halved and rounded up
    return [F.interpolate(mask, size, mode="area") for size in sizes]


def total(residuals: Iterable[list[Tensor]]) -> list[Tensor] | None:
    """The sum of all controls' residuals, layer by layer (section 3.4 of the paper); None without controls."""
    return [sum(layer[1:], layer[0]) for layer in zip(*residuals, strict=True)] or None


def fill_batch(features: Tensor, count: int) -> Tensor:
    """(1 or B, C, h, w) -> (1 or count, C, h, w): what is one for all is left to broadcasting."""
    return features if len(features) == 1 else features.repeat(count // len(features), 1, 1, 1)
