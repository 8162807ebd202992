"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) with ControlNets: one denoiser for the samplers.

Shapes: x (B, 4, h, w), t (B,), contexts (B, M, D), hints (1 or B, 3, H, W) in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.unet import UNet

from .model import ControlNet


@dataclass(frozen=True)
class Control:
    """One ControlNet in use: its hint and how strongly its residuals are added."""

    net: ControlNet
    hint: Tensor
    scale: float = 1.0


def guided(
    unet: UNet, prompt: Tensor, negative: Tensor, cfg: float, controls: Sequence[Control] = ()
) -> Callable[[Tensor, Tensor], Tensor]:
    """-> denoise(x, t): the raw output, moved away from the negative prompt's by the factor `cfg`.

    output = negative + cfg (prompt - negative), both from one batch of twice the size; at cfg 1 the negative prompt
    has no effect and is not computed. The guidance acts on the raw output, whether that is eps or v.
    """
    branches = 1 if cfg == 1 else 2
    context = prompt if branches == 1 else torch.cat([negative, prompt])  # (branches B, M, D)
    # A hint does not change from step to step: encoded once, and repeated for the whole batch.
    features = [_fill_batch(control.net.hint_encoder(control.hint), len(context)) for control in controls]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        x, t = x.repeat(branches, 1, 1, 1), t.repeat(branches)
        residuals = None
        for control, feature in zip(controls, features, strict=True):
            added = [control.scale * r for r in control.net.residuals(x, t, context, feature)]
            residuals = added if residuals is None else [a + b for a, b in zip(residuals, added, strict=True)]
        output = unet(x, t, context, residuals)
        if branches == 1:
            return output
        negative_output, prompt_output = output.chunk(2)
        return negative_output + cfg * (prompt_output - negative_output)

    return denoise


def _fill_batch(features: Tensor, count: int) -> Tensor:
    """(1 or B, C, h, w) -> (count, C, h, w)."""
    return features.repeat(count // len(features), 1, 1, 1)
