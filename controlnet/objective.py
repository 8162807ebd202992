"""The training loss: E || eps - eps_theta(z_t, t, c_t, c_f) ||^2 (arXiv 2302.05543v3, Eq. 5), or v for v-models.

Shapes: z0 scaled latents (B, 4, h, w), noise like z0, t (B,) whole timesteps, context (B, M, D), hint (B, 3, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    min_snr: float | None = None,
) -> Tensor:
    """The loss of a ControlNet. With a locked base (`requires_grad_(False)`) gradients go to the control alone.

    `min_snr` is the gamma of `min_snr_weights`; None weighs every timestep alike.
    """
    z_t = schedule.q_sample(z0, t, noise)
    # Nothing that is trained lies before or inside the locked encoder, so it needs no gradients and keeps no
    # activations. The decoder is locked too, but the residuals enter it: their gradients must come back through it.
    with torch.no_grad():
        encoded = unet.encoder(z_t, t, context)
    residuals = control(z_t, t, context, hint)
    output = unet.decode(encoded, context, residuals)
    target = schedule.target(z0, t, noise)
    if min_snr is None:
        return F.mse_loss(output.float(), target)
    errors = F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return (min_snr_weights(schedule, t, min_snr) * errors).mean()


def min_snr_weights(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """(B,): each timestep's weight such that the error of x0 counts min(SNR, gamma), not SNR.

    Hang et al., arXiv 2303.09556, Eq. 8 and section 3.4: min(SNR, gamma) over SNR for eps, over SNR + 1 for v.
    """
    alpha, sigma = schedule.alpha.to(t.device)[t], schedule.sigma.to(t.device)[t]
    snr = (alpha / sigma) ** 2
    unweighted = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[schedule.config.prediction]
    return snr.clamp(max=gamma) / unweighted


class ControlLoss(nn.Module):
    """`control_loss` as a module's forward pass, which is what DistributedDataParallel and torch.compile work on."""

    def __init__(self, unet: UNet, control: ControlNet, schedule: Schedule, min_snr: float | None = None):
        super().__init__()
        self.unet, self.control, self.schedule, self.min_snr = unet, control, schedule, min_snr

    def forward(self, z0: Tensor, noise: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        return control_loss(self.unet, self.control, self.schedule, z0, noise, t, context, hint, self.min_snr)


def only_middle(control: ControlNet) -> None:
    """Trains the control of the middle block alone (the published `only_mid_control`): the other residuals stay zero,
    because their zero convolutions are locked at zero."""
    for conv in control.zero_convs:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    control.zero_convs.requires_grad_(False)


def zero_conv_norms(control: ControlNet) -> list[float]:
    """The norm of each output's zero convolution, the middle's last: what grows when control sets in, while the loss
    hardly shows it."""
    convs = [*control.zero_convs, control.middle_zero_conv]
    return [float(torch.cat([p.detach().flatten() for p in conv.parameters()]).norm()) for conv in convs]
