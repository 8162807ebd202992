"""The architecture of a ControlNet as numbers."""

from dataclasses import dataclass
from typing import Literal

from ldm.config import check_fields

HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2)  # of the convolutions of `hint_widths`: 8 times smaller in all, as the VAE


@dataclass(frozen=True)
class ControlConfig:
    """What a ControlNet adds to the copy of the UNet's encoder."""

    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 16, 32, 32, 96, 96, 256)  # of the hint encoder's convolutions but the last
    # Each residual is replaced by its mean over all positions, as in ControlNet 1.1's shuffle model. The network only
    # averages: to keep such a control out of the negative prompt's branch, too, is the caller's part
    # (`Control.prompt_only`).
    global_average_pooling: bool = False
    # "lite" has one convolution in place of each copied block: the paper's ablation, section 4.2. "concat" has the hint
    # at the base's own input. Both are in ablations.py.
    architecture: Literal["full", "lite", "concat"] = "full"

    def __post_init__(self):
        check_fields(self)
        if len(self.hint_widths) != len(HINT_STRIDES):
            raise ValueError(f"hint_widths has {len(self.hint_widths)} entries, expected {len(HINT_STRIDES)}")
