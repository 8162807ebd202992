"""Noise that is each image's own: drawn from its generator on the CPU, it is the same on every device and in every
batch."""

import torch
from torch import Generator, Tensor

from controlnet.common.devices import sent
from ldm.samplers import Noise


def draw(generators: list[Generator], shape: tuple[int, ...]) -> Tensor:
    """Unit noise (B, *shape) on the CPU, a row from each generator."""
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators])


def noise_from(generators: list[Generator]) -> Noise:
    """noise(x) -> unit noise like x, fp32, one row from each generator."""
    return lambda x: sent(draw(generators, x.shape[1:]), x.device)
