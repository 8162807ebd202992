"""The forward process: how noise enters a latent, what the UNet is trained to predict, and how to read its output.

Symbols, as in DPM-Solver (arXiv 2206.00927): x_t = alpha_t x0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1. DDPM's
"alpha bar" is alpha_t^2 and is called `alphas_cumprod` here, as in the released checkpoints.
Shapes: x, x0, noise, output (B, C, h, w) in any floating dtype, t (B,) timesteps on the same device: whole ones in
[0, T), int64, or floats in [0, T - 1], between which the logarithm of sigma / alpha is linear (as in k-diffusion).
"""

import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .config import ScheduleConfig


class Schedule:
    """The tables of the forward process and the conversions between eps, v and x0.

    betas           (T,) fp64, linear in their square root (Rombach et al., arXiv 2112.10752, the released code)
    alphas_cumprod  (T,) fp32, computed in fp64: the buffer of the released checkpoints
    alpha, sigma    (T,) fp32, computed in fp64: what an image and its noise are multiplied by
    noise_ratios    (T,) fp64, sigma / alpha as `alphas_cumprod` has it: the noise levels of Karras et al.
    """

    def __init__(self, config: ScheduleConfig):
        self.config = config
        start, end = config.beta_start**0.5, config.beta_end**0.5
        self.betas = torch.linspace(start, end, config.timesteps, dtype=torch.float64) ** 2
        if config.zero_terminal_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.alphas_cumprod = alphas_cumprod.float()
        self.alpha = alphas_cumprod.sqrt().float()
        self.sigma = (1 - alphas_cumprod).sqrt().float()

    @cached_property
    def noise_ratios(self) -> np.ndarray:
        with np.errstate(divide="ignore"):  # zero terminal SNR ends with infinite noise
            return (1 / self.alphas_cumprod.double().numpy() - 1) ** 0.5

    def to(self, device: torch.device | str) -> "Schedule":
        """The same with `alpha` and `sigma` on a device. Brought there at each use, they would make the CPU wait."""
        other = copy.copy(self)
        other.alpha, other.sigma = self.alpha.to(device), self.sigma.to(device)
        return other

    def alpha_bar_at(self, timestep: float) -> float:
        """`alphas_cumprod`, also at a fractional timestep."""
        if timestep == int(timestep):
            return self.alphas_cumprod[int(timestep)].item()
        log_ratio = np.interp(timestep, np.arange(len(self.noise_ratios)), np.log(self.noise_ratios))
        return float(1 / (1 + np.exp(2 * log_ratio)))

    def timestep_at(self, alpha_bar: float) -> float:
        """The inverse of `alpha_bar_at`: the timestep, usually fractional, that is as noisy. It is rounded to six
        digits, so that there and back again is the same timestep."""
        log_ratio = 0.5 * np.log(1 / alpha_bar - 1)
        return round(float(np.interp(log_ratio, np.log(self.noise_ratios), np.arange(len(self.noise_ratios)))), 6)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t, a draw from q(x_t | x0) made with the given noise (DDPM, arXiv 2006.11239, Eq. 4)."""
        alpha, sigma = self._at(t, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the UNet is trained to output for x_t, by `config.prediction`.

        v = alpha eps - sigma x0 is from Salimans and Ho, arXiv 2202.00512, section 4.
        """
        if self.config.prediction == "eps":
            return noise
        if self.config.prediction == "x0":
            return x0
        alpha, sigma = self._at(t, x0)
        return (alpha * noise - sigma * x0).to(x0.dtype)

    def to_x0(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The clean picture that the UNet's raw output at x_t stands for, in the dtype of x."""
        if self.config.prediction == "x0":
            return output.to(x.dtype)
        alpha, sigma = self._at(t, x)
        if self.config.prediction == "v":
            return (alpha * x - sigma * output).to(x.dtype)
        return ((x - sigma * output) / alpha).to(x.dtype)

    def to_eps(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The noise that the UNet's raw output at x_t stands for, in the dtype of x."""
        if self.config.prediction == "eps":
            return output.to(x.dtype)
        alpha, sigma = self._at(t, x)
        if self.config.prediction == "v":
            return (sigma * x + alpha * output).to(x.dtype)
        return ((x - alpha * output) / sigma).to(x.dtype)

    def _at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, on x's device and broadcasting over x: (B, 1, 1, 1). They are fp32, which makes the
        arithmetic with a half-precision x fp32 too."""
        alpha, sigma = self.alpha.to(x.device), self.sigma.to(x.device)
        if t.is_floating_point():
            low, ratio = t.long(), sigma / alpha
            high, part = (low + 1).clamp(max=len(ratio) - 1), t - low
            ratio = ratio[low] ** (1 - part) * ratio[high] ** part  # of infinite noise, ** 0 is 1
            alpha_t, sigma_t = (1 + ratio**2).rsqrt(), (1 + ratio**-2).rsqrt()
        else:
            alpha_t, sigma_t = alpha[t], sigma[t]
        shape = (-1,) + (1,) * (x.ndim - 1)
        return alpha_t.reshape(shape), sigma_t.reshape(shape)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) such that x_T is pure noise and x_1 is as noisy as before (Lin et al., arXiv 2305.08891, Alg. 1)."""
    alpha = torch.cumprod(1 - betas, dim=0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alphas_cumprod = alpha**2
    # Step by step again: the first one is kept, each other is the ratio of two neighbours.
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
