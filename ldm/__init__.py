"""The locked model: Stable Diffusion 1.x and 2.x, nothing about control."""

from .stable_diffusion import StableDiffusion

__all__ = ["StableDiffusion"]
