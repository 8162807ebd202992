"""The training loss: E || eps - eps_theta(z_t, t, c_t, c_f) ||^2 (arXiv 2302.05543v3, Eq. 5), or v for v-models.

Shapes: z0 scaled latents (B, 4, h, w), noise like z0, t (B,) whole timesteps, context (B, M, D), hint (B, 3, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.schedule import Schedule
from ldm.unet import UNet

from .model import ControlNet


def base_loss(unet: UNet, schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """What the base itself is trained with: the same loss without a control."""
    output = unet(schedule.q_sample(z0, t, noise), t, context)
    return F.mse_loss(output.float(), schedule.target(z0, t, noise))


def control_loss(
    unet: UNet,
    control: ControlNet,
    schedule: Schedule,
    z0: Tensor,
    noise: Tensor,
    t: Tensor,
    context: Tensor,
    hint: Tensor,
) -> Tensor:
    """The loss of a ControlNet. With a locked base (`requires_grad_(False)`) gradients go to the control alone."""
    z_t = schedule.q_sample(z0, t, noise)
    # Nothing that is trained lies before or inside the locked encoder, so it needs no gradients and keeps no
    # activations. The decoder is locked too, but the residuals enter it: their gradients must come back through it.
    with torch.no_grad():
        encoded = unet.encoder(z_t, t, context)
    residuals = control(z_t, t, context, hint)
    output = unet.decode(encoded, context, residuals)
    return F.mse_loss(output.float(), schedule.target(z0, t, noise))
