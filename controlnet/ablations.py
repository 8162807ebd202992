"""What ControlNet is compared with: the baselines of the paper's ablation study (section 4.2, Figure 8), and three more
that take away one of its ideas each: the base's weights, the training of the copy, the copy itself.

`--architecture`   how it differs from a ControlNet
lite               a convolution in place of each copied block (the paper's)
gaussian           ordinary convolutions in place of the zero convolutions (the paper's)
random             the copy starts from random weights, not from the base's
frozen             the copy stays as it is: hint encoder and zero convolutions learn
concat             no copy: the hint is concatenated to the input of the locked encoder
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import kaiming_normal_

from ldm.blocks import Downsample
from ldm.unet import Checkpointed, UNet, UNetEncoder

from .config import ControlConfig
from .model import ControlNet

# ------------------------------------------------------------------------------------------- built in another way


class LiteBlock(nn.Conv2d):
    """One convolution in place of a copied block. It sees neither the time nor the prompt."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, first: bool = False):
        super().__init__(c_in, c_out, 3, stride, padding=1)
        self.first = first
        kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, time: None, context: Tensor) -> Tensor:
        return super().forward(x if self.first else F.silu(x))


class LiteEncoder(Checkpointed):
    """In place of the copy, a convolution for each block, trained from scratch."""

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


class ControlNetLite(ControlNet):
    """The paper's "ControlNet-lite"."""

    architecture = "lite"

    def copy_of(self, encoder: UNetEncoder) -> nn.Module:
        return LiteEncoder(encoder)


class HintAtInput(ControlNet):
    """The hint's features concatenated to the latents that the locked encoder reads, in place of a trained copy.

    A convolution of [x, features] is one of x plus one of the features. So a first convolution that is widened for the
    features gives what the base's own gives, plus what the hint encoder's last one gives, which starts at zero. The
    encoder behind it, locked as in the base, then sees the hint. The residuals are how much its outputs change by that:
    with them the decoder gets exactly what it would get in such a base. That would run its encoder once; here it runs
    three times.
    """

    architecture = "concat"

    def __init__(self, unet: UNet, config: ControlConfig):
        super().__init__(unet, config)
        self.zero_convs = nn.ModuleList(nn.Identity() for _ in self.zero_convs)
        self.middle_zero_conv = nn.Identity()

    def requires_grad_(self, requires_grad: bool = True) -> "HintAtInput":
        super().requires_grad_(requires_grad)
        self.encoder.requires_grad_(False)
        return self

    def residuals(self, x: Tensor, t: Tensor, context: Tensor, hint_features: Tensor) -> list[Tensor]:
        with torch.no_grad():
            without = super().residuals(x, t, context, torch.zeros_like(hint_features))
        with_hint = super().residuals(x, t, context, hint_features)
        return [changed - own for changed, own in zip(with_hint, without, strict=True)]


BASELINES = {baseline.architecture: baseline for baseline in (ControlNetLite, HintAtInput)}


# ----------------------------------------------------------------------------------- built alike, trained otherwise


def start_as(control: ControlNet, architecture: str) -> None:
    """What `--architecture` changes of a fresh ControlNet before its training, on resume too."""
    changes = {"gaussian": start_as_gaussian, "random": start_from_random_weights, "frozen": lock_copy}
    if architecture in changes:
        changes[architecture](control)


def start_as_gaussian(control: ControlNet) -> None:
    """Ordinary Gaussian weights where the zero convolutions start at zero: the first steps then disturb the base."""
    for conv in (control.hint_encoder.convs[-1], *control.zero_convs, control.middle_zero_conv):
        kaiming_normal_(conv.weight, nonlinearity="linear")


def start_from_random_weights(control: ControlNet) -> None:
    """PyTorch's own initialisation: of the base only the architecture is left."""
    for module in control.encoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def lock_copy(control: ControlNet) -> None:
    control.encoder.requires_grad_(False)


def only_middle(control: ControlNet) -> None:
    """Trains the control of the middle block alone (the released `only_mid_control`): the other zero convolutions are
    locked at zero."""
    for conv in control.zero_convs:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    control.zero_convs.requires_grad_(False)
