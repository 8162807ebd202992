"""ControlNet on Stable Diffusion (arXiv 2302.05543): the method is in model.py, objective.py and guidance.py."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .guidance import Control
    from .inference.generate import generate
    from .model import ControlNet

__all__ = ["Control", "ControlNet", "generate"]

HOMES = {"Control": ".guidance", "ControlNet": ".model", "generate": ".inference.generate"}


def __getattr__(name: str):
    """A public name is imported when it is asked for (PEP 562): parts of this package work without PyTorch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
