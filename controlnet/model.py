"""ControlNet: Zhang, Rao, Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543v3.

A locked block computes y = F(x; Theta) (Eq. 1). ControlNet adds a trainable copy of it, between two zero convolutions
Z that join it to the condition c and to the locked block:

    y_c = F(x; Theta) + Z(F(x + Z(c; Theta_z1); Theta_c); Theta_z2)                                          (Eq. 2)

At the start both Z give zero, so y_c = y (Eq. 3): training begins from the undisturbed base. Applied to Stable
Diffusion (the paper's Figure 3), the locked blocks are the twelve of the UNet's encoder and its middle. The residuals
y_c - y are added to their outputs before the decoder concatenates these (`UNet.decode` in ldm/unet.py).

Where the released weights differ from the paper's text, this follows the weights:
- the hint encoder is eight 3x3 convolutions, the last one the first zero convolution of Eq. 2, with SiLU and 16 to 256
  channels; the paper's is four of 4x4 with ReLU and 16 to 128;
- the sum x + Z(c) is made after the copy's first convolution, not before it, and once, not in each block.

Shapes: B batch, H W pixels, h = H/8, w = W/8, C channels, M prompt tokens, D context width.
"""

import copy
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import kaiming_normal_, zeros_

from ldm.unet import Checkpointed, UNet, UNetEncoder

from .checkpoint import ControlCheckpoint
from .config import HINT_STRIDES, ControlConfig


def zero_conv(c_in: int, c_out: int, kernel: int = 1) -> nn.Conv2d:
    """Z of Eq. 2, which starts at zero. It learns all the same: its weight's gradient is proportional to its input."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    zeros_(conv.weight)
    zeros_(conv.bias)
    return conv


class HintEncoder(Checkpointed):
    """c_f = E(c_i) (Eq. 4): a hint (B, 3, H, W), RGB in [0, 1] -> features (B, C, h, w) at the latents' resolution.

    Eight 3x3 convolutions, with SiLU after all but the last, which starts at zero:

        output channels   16  16  32  32  96  96  256  C (320)
        stride             1   1   2   1   2   1    2  1
    """

    def __init__(self, config: ControlConfig, c_out: int):
        super().__init__()
        widths = (config.hint_channels, *config.hint_widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, padding=1) for (a, b), stride in zip(pairwise(widths), HINT_STRIDES, strict=True)
        )
        for conv in self.convs:
            # Gaussian, as the paper says. PyTorch's default, which the released code leaves, shrinks the signal to a
            # third in each layer, and control sets in later.
            kaiming_normal_(conv.weight, nonlinearity="relu")
        self.convs.append(zero_conv(widths[-1], c_out, kernel=3))

    def forward(self, hint: Tensor) -> Tensor:
        return self.run_checkpointed(self.encode, hint)

    def encode(self, x: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = F.silu(conv(x))
        return self.convs[-1](x)


class ControlNet(ControlCheckpoint, nn.Module):
    """The trainable copy of a UNet's encoder, with its hint encoder and its zero convolutions (section 3.2, Figure 3).

    `load`, `save` and `transfer` to another base are in checkpoint.py.
    """

    architecture = "full"

    def __init__(self, unet: UNet, config: ControlConfig = ControlConfig()):
        """Raises ValueError if `config` is that of a baseline, which `ControlNet.of` makes."""
        super().__init__()
        if config.architecture != self.architecture:
            raise ValueError(f'the architecture is "{config.architecture}": take ControlNet.of(unet, config)')
        self.config = config
        self.hint_encoder = HintEncoder(config, unet.config.channels)
        self.encoder = self.copy_of(unet.encoder)
        self.zero_convs = nn.ModuleList(zero_conv(c, c) for c in self.encoder.skip_widths)
        self.middle_zero_conv = zero_conv(unet.config.widths[-1], unet.config.widths[-1])

    def copy_of(self, encoder: UNetEncoder) -> nn.Module:
        return copy.deepcopy(encoder)

    @classmethod
    def of(cls, unet: UNet, config: ControlConfig) -> "ControlNet":
        """`ControlNet(unet, config)`, or the baseline that `config.architecture` names."""
        from .ablations import BASELINES  # which are made of this class

        return BASELINES.get(config.architecture, cls)(unet, config)

    @classmethod
    def from_unet(cls, unet: UNet, config: ControlConfig = ControlConfig()) -> "ControlNet":
        """A fresh trainable copy, in fp32 whatever the base is stored in. All its residuals are zero.

        Raises ValueError for the UNet of an inpainting base, which reads more than latents.
        """
        if unet.config.inpainting:
            raise ValueError("the base is an inpainting model: copy the encoder of the base that it was made from")
        return cls.of(unet, config).to(next(unet.parameters()).device).float().requires_grad_(True)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """The residuals for `UNet.forward`: one (B, C, h, w) for each skip in the encoder's order, the middle's last.

        x (B, 4, h, w), t (B,), context (B, M, D), hint (B, 3, H, W), RGB in [0, 1].
        """
        return self.residuals(x, t, context, self.hint_encoder(hint))

    def residuals(self, x: Tensor, t: Tensor, context: Tensor, hint_features: Tensor) -> list[Tensor]:
        """`forward` from the hint encoder's features, (1 or B, C, h, w), which are the same at every step."""
        encoder = self.encoder
        time = encoder.time_embedding(t)  # (B, 4 C) of the first block's C
        x = encoder.run_checkpointed(encoder.blocks[0], x, time, context)
        x = x + hint_features  # (B, C, h, w): the only place where the hint enters
        residuals = [self.zero_convs[0](x)]
        for block, conv in zip(encoder.blocks[1:], self.zero_convs[1:], strict=True):
            x = encoder.run_checkpointed(block, x, time, context)
            residuals.append(conv(x))
        residuals.append(self.middle_zero_conv(encoder.run_checkpointed(encoder.middle, x, time, context)))
        if self.config.global_average_pooling:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]  # (B, C, 1, 1)
        return residuals
