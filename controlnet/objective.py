"""What a ControlNet is trained to do: what is drawn at random for a sample, what the networks get, and the loss.

    E || eps - eps_theta(z_t, t, c_t, c_f) ||^2        over z0, t, c_t, c_f and eps        (arXiv 2302.05543v3, Eq. 5)

with the image's latents z0, the noise eps, z_t = alpha_t z0 + sigma_t eps, the prompt c_t and the hint c_f; or v in
place of eps for v-models.

Shapes: B batch, h w positions, D context width; z0 and noise (B, 4, h, w), t (B,) whole timesteps,
context (B, 77, D), hint (B, 3, H, W) in [0, 1].
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlnet.common.devices import sent
from ldm.schedule import Schedule
from ldm.unet import UNet
from ldm.vae import Posterior

from .model import ControlNet

# ------------------------------------------------------------------------------------------------- what is drawn


class Drawn(NamedTuple):
    """All that is random in a batch's loss."""

    t: Tensor  # (B,) timesteps
    noise: Tensor  # (B, 4, h, w), the eps of Eq. 5
    posterior_noise: Tensor  # (B, 4, h, w), for a sample of the autoencoder's posterior
    dropped: Tensor  # (B,) bool: whether the prompt is replaced by the empty one


@dataclass(frozen=True)
class Draws:
    """Draws for samples by their positions: position p is the p-th sample that a run looks at.

    What is drawn follows from (seed, p) alone. So it does not depend on how the samples are cut into batches or shared
    among processes, and a resumed run needs no random states, only p.
    """

    latent_shape: tuple[int, int, int]  # (4, h, w), where a call gives no other
    timesteps: int  # T of the schedule
    prompt_dropout: float  # 0.5 in the paper (section 3.3): hints must be understood without a prompt, too
    seed: int

    def __call__(self, positions: Iterable[int], latent_shape: Sequence[int] | None = None) -> Drawn:
        samples = (self.of_sample(position, latent_shape or self.latent_shape) for position in positions)
        return Drawn(*(torch.stack(rows) for rows in zip(*samples, strict=True)))

    def of_sample(self, position: int, latent_shape: Sequence[int]) -> Drawn:
        generator = seeded(self.seed, 2, position)
        noise = torch.randn(latent_shape, generator=generator)
        t = torch.randint(self.timesteps, (), generator=generator)  # uniform over [0, T)
        posterior_noise = torch.randn(latent_shape, generator=generator)
        dropped = torch.rand((), generator=generator) < self.prompt_dropout
        return Drawn(t, noise, posterior_noise, dropped)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator of its own for, say, (seed, purpose, position). The purpose is a number: 1 is the order of the
    samples, 2 what is drawn here, 3 what a source draws for a sample, 4 and 5 the order of archives and their pairs."""
    sequence = np.random.SeedSequence(numbers)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


# ------------------------------------------------------------------------------------------- what the networks get


class EncodedPairs(NamedTuple):
    """Images and captions after the locked encoders."""

    mean: Tensor  # (B, 4, h, w), of the autoencoder's posterior, unscaled
    logvar: Tensor  # (B, 4, h, w), its log-variance
    context: Tensor  # (B, 77, D)


def loss_inputs(
    pairs: EncodedPairs, hint: Tensor, drawn: Drawn, latent_scale: float, empty_prompt: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> z0, noise, t, context and hint on `device`, for `ControlLoss`.

    z0 is a fresh sample of the posterior, as in the released code, not its mean; it is scaled to unit standard
    deviation. Dropped prompts become `empty_prompt` (1, 77, D), the text encoder's output for "".
    """
    mean, logvar, context, hint = (sent(tensor, device) for tensor in (*pairs, hint))
    t, noise, posterior_noise, dropped = (sent(tensor, device) for tensor in drawn)
    z0 = latent_scale * Posterior(mean.float(), logvar.float()).sample(posterior_noise)
    context = torch.where(dropped[:, None, None], empty_prompt, context)
    return z0, noise, t, context, hint


# --------------------------------------------------------------------------------------------------------- the loss


class ControlLoss(nn.Module):
    """The loss as a module's forward pass, which DistributedDataParallel and torch.compile can wrap.

    Gradients go to the control and, if it is unlocked, to the decoder. `min_snr` is the gamma of `min_snr_weights`;
    None weights all timesteps alike.
    """

    def __init__(self, unet: UNet, control: ControlNet, schedule: Schedule, min_snr: float | None = None):
        super().__init__()
        self.unet, self.control, self.schedule, self.min_snr = unet, control, schedule, min_snr

    def forward(self, z0: Tensor, noise: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        z_t = self.schedule.q_sample(z0, t, noise)
        dtype = next(self.unet.encoder.parameters()).dtype
        # Nothing that is trained lies before or inside the locked encoder, so it needs no gradients and keeps no
        # activations. The decoder is locked, too, but the residuals enter it: their gradients come back through it.
        with torch.no_grad(), own_precision(self.unet.encoder, z_t.device):
            encoded = self.unet.encoder(z_t.to(dtype), t, context.to(dtype))
        residuals = [residual.to(dtype) for residual in self.control(z_t, t, context, hint)]
        with own_precision(self.unet.decoder, z_t.device):
            output = self.unet.decode(encoded, context.to(dtype), residuals)
        return denoising_loss(self.schedule, output, z0, noise, t, self.min_snr)


def own_precision(network: nn.Module, device: torch.device) -> AbstractContextManager:
    """Switches autocast off around a locked network, which is stored in the type that it is to compute in.

    Autocast is for fp32 parameters that are trained. On CUDA it would also compute all norms in fp32.
    """
    locked = not any(parameter.requires_grad for parameter in network.parameters())
    return torch.autocast(device.type, enabled=False) if locked else nullcontext()


def denoising_loss(
    schedule: Schedule, output: Tensor, z0: Tensor, noise: Tensor, t: Tensor, min_snr: float | None = None
) -> Tensor:
    """The mean squared error of a UNet's output to the schedule's target: the base itself is trained with it, too."""
    target = schedule.target(z0, t, noise)
    if min_snr is None:
        return F.mse_loss(output.float(), target)
    errors = F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return (min_snr_weights(schedule, t, min_snr) * errors).mean()


def min_snr_weights(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """(B,): weights for timesteps, so that the error of x0 is weighted by min(SNR, gamma) instead of SNR.

    Hang et al., arXiv 2303.09556, Eq. 8 and section 3.4: min(SNR, gamma) over SNR for eps, over SNR + 1 for v.
    """
    alpha, sigma = schedule.alpha.to(t.device)[t], schedule.sigma.to(t.device)[t]
    snr = (alpha / sigma) ** 2
    unweighted = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[schedule.config.prediction]
    return snr.clamp(max=gamma) / unweighted
