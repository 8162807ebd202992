"""The baselines of the paper's ablation study (section 4.2, Figure 8): no copy of the encoder, no zero convolutions."""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import kaiming_normal_

from ldm.blocks import Downsample
from ldm.unet import Checkpointed, UNetEncoder

if TYPE_CHECKING:  # model.py imports this file
    from .model import ControlNet


class LiteBlock(nn.Conv2d):
    """One convolution in place of a copied block. It sees neither the time nor the prompt."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, first: bool = False):
        super().__init__(c_in, c_out, 3, stride, padding=1)
        self.first = first
        kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, time: None, context: Tensor) -> Tensor:
        return super().forward(x if self.first else F.silu(x))


class LiteEncoder(Checkpointed):
    """ "ControlNet-lite": in place of the copy, a convolution for each block, trained from scratch."""

    def __init__(self, encoder: UNetEncoder):
        super().__init__()
        self.config, self.skip_widths = encoder.config, encoder.skip_widths
        widths = [encoder.config.input_channels, *encoder.skip_widths]
        self.blocks = nn.ModuleList(
            LiteBlock(a, b, stride=2 if halves_resolution(block) else 1, first=i == 0)
            for i, ((a, b), block) in enumerate(zip(pairwise(widths), encoder.blocks, strict=True))
        )
        self.middle = LiteBlock(widths[-1], widths[-1])

    def time_embedding(self, t: Tensor) -> None:
        return None


def halves_resolution(block: nn.Module) -> bool:
    return any(isinstance(part, Downsample) for part in block.modules())


def start_as_gaussian(control: "ControlNet") -> None:
    """Ordinary Gaussian weights where the zero convolutions start at zero: the first steps then disturb the base."""
    for conv in (control.hint_encoder.convs[-1], *control.zero_convs, control.middle_zero_conv):
        kaiming_normal_(conv.weight, nonlinearity="linear")


def only_middle(control: "ControlNet") -> None:
    """Trains the control of the middle block alone (the released `only_mid_control`): the other zero convolutions are
    locked at zero."""
    for conv in control.zero_convs:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    control.zero_convs.requires_grad_(False)
