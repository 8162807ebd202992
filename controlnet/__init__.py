"""ControlNet on Stable Diffusion (arXiv 2302.05543): see model.py."""

__all__ = ["ControlNet"]


def __getattr__(name: str):
    """ControlNet, imported when it is asked for: controlnet.hints needs no torch, nor does the programs' --help."""
    if name == "ControlNet":
        from .model import ControlNet

        return ControlNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
