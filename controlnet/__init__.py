"""ControlNet on Stable Diffusion (arXiv 2302.05543): see model.py."""

from .model import ControlNet

__all__ = ["ControlNet"]
