"""ControlNet: Zhang, Rao, Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543v3.

A locked block computes y = F(x; Theta) (Eq. 1). ControlNet adds a trainable copy of it, between two zero convolutions
Z that join it to the condition c and to the locked block:

    y_c = F(x; Theta) + Z(F(x + Z(c; Theta_z1); Theta_c); Theta_z2)                                          (Eq. 2)

At the start both Z give zero, so y_c = y (Eq. 3): training begins from the undisturbed base. Applied to Stable
Diffusion (the paper's Figure 3), the locked blocks are the twelve of the UNet's encoder and its middle, and their
y_c - y, the residuals, are added where the decoder takes the encoder's outputs.

Where the released weights differ from the paper's text, this follows the weights:
- the hint encoder has seven 3x3 convolutions with SiLU and 16 to 256 channels, not four of 4x4 with ReLU and 16 to 128,
  and ends in the first zero convolution of Eq. 2, also 3x3;
- that sum x + Z(c) is made after the copy's first convolution, not before it, and once, not in each block.

Shapes: B batch, H W pixels, h = H/8, w = W/8, C channels, M prompt tokens, D context width.
"""

import copy
import json
import warnings
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.blocks import Downsample
from ldm.checkpoints.checkpoint import (
    IGNORED_BESIDE_CONTROL,
    Checkpoint,
    CheckpointError,
    gather,
    load_parts,
    open_checkpoint,
    save_checkpoint,
    without_weights,
)
from ldm.checkpoints.diffusers_layout import control_values, save_control
from ldm.checkpoints.key_maps import Layout, control_map, diffusers_control_map, unet_map
from ldm.checkpoints.recognise import recognise_control
from ldm.config import ControlConfig
from ldm.unet import Checkpointed, Encoded, UNet, UNetEncoder


def zero_conv(c_in: int, c_out: int, kernel: int = 1) -> nn.Conv2d:
    """A convolution that starts at zero. Its own gradient does not vanish there: dZ/dweight is its input."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class HintEncoder(Checkpointed):
    """c_f = E(c_i) (Eq. 4): a hint (B, 3, H, W) in [0, 1] -> features (B, C, h, w) at the latents' resolution."""

    def __init__(self, config: ControlConfig, c_out: int):
        super().__init__()
        widths = (config.hint_channels, *config.hint_widths)
        strides = (1, 1, 2, 1, 2, 1, 2)  # 8 times smaller in all, as the VAE
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, padding=1) for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        for conv in self.convs:
            # Gaussian, as the paper has it. PyTorch's default would shrink the hint to a third in each layer: control
            # then sets in much later.
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.convs.append(zero_conv(widths[-1], c_out, kernel=3))

    def forward(self, hint: Tensor) -> Tensor:
        return self.run(self.encode, hint)

    def encode(self, x: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = F.silu(conv(x))
        return self.convs[-1](x)


class LiteEncoder(nn.Module):
    """In place of the copy, the paper's ablation "ControlNet-lite" (section 4.2): one convolution for each block, made
    from nothing. It sees neither the time nor the prompt."""

    def __init__(self, encoder: UNetEncoder):
        super().__init__()
        self.config, self.skip_widths = encoder.config, encoder.skip_widths
        widths = [encoder.config.latent_channels, *encoder.skip_widths]
        strides = [2 if is_downsampling(block) else 1 for block in encoder.blocks]
        self.blocks = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, padding=1) for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.middle = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        for conv in (*self.blocks, self.middle):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint_features: Tensor) -> Encoded:
        skips = []
        for i, conv in enumerate(self.blocks):
            x = conv(x) + hint_features if i == 0 else conv(F.silu(x))
            skips.append(x)
        return Encoded(skips, self.middle(F.silu(x)), t)


def is_downsampling(block: nn.Module) -> bool:
    return any(isinstance(part, Downsample) for part in block.modules())


def start_as_gaussian(control: "ControlNet") -> None:
    """The paper's other ablation (section 4.2): ordinary Gaussian weights where the zero convolutions start."""
    for conv in (control.hint_encoder.convs[-1], *control.zero_convs, control.middle_zero_conv):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")


class ControlNet(nn.Module):
    """The trainable copy of a UNet's encoder with its hint encoder and its zero convolutions."""

    def __init__(self, unet: UNet, config: ControlConfig = ControlConfig()):
        super().__init__()
        self.config = config
        self.hint_encoder = HintEncoder(config, unet.config.channels)
        self.encoder = copy.deepcopy(unet.encoder) if config.architecture == "full" else LiteEncoder(unet.encoder)
        self.zero_convs = nn.ModuleList(zero_conv(c, c) for c in self.encoder.skip_widths)
        self.middle_zero_conv = zero_conv(unet.config.widths[-1], unet.config.widths[-1])

    @classmethod
    def from_unet(cls, unet: UNet, config: ControlConfig = ControlConfig()) -> "ControlNet":
        """A fresh trainable copy, in fp32 whatever the base is stored in. All its outputs are zero."""
        return cls(unet, config).to(next(unet.parameters()).device).float().requires_grad_(True)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """The residuals for `UNet.forward`: one (B, C, h, w) for each skip in the encoder's order, the middle's last.

        x (B, 4, h, w), t (B,), context (B, M, D), hint (B, 3, H, W) in [0, 1]. With global average pooling a residual
        is the mean over its positions, (B, C, 1, 1).
        """
        return self.residuals(x, t, context, self.hint_encoder(hint))

    def residuals(self, x: Tensor, t: Tensor, context: Tensor, features: Tensor) -> list[Tensor]:
        """`forward` from the hint encoder's `features`, (1 or B, C, h, w), which stay the same from step to step."""
        encoded = self.encoder(x, t, context, hint_features=features)
        residuals = [conv(skip) for conv, skip in zip(self.zero_convs, encoded.skips, strict=True)]
        residuals.append(self.middle_zero_conv(encoded.middle))
        if self.config.global_average_pooling:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]  # (B, C, 1, 1)
        return residuals

    @classmethod
    def load(
        cls,
        path: str | Path,
        unet: UNet,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        global_average_pooling: bool | None = None,
    ) -> "ControlNet":
        """A trained ControlNet for `unet`, on its device and in its dtype unless others are given; it stays trainable.

        The file or folder is in any published layout; of a base together with its ControlNet only the latter is read,
        with a warning if that base is not `unet`. To a file that holds the difference to a base, `unet` is added.
        `global_average_pooling` says what no tensor does: see recognise.py.
        Raises CheckpointError if there is no such file, no ControlNet in it, or one that does not fit `unet`.
        """
        checkpoint = open_checkpoint(path)
        found = recognise_control(checkpoint, global_average_pooling)
        with without_weights():
            control = cls(UNet(unet.config), found.config)
        like = next(unet.parameters())
        device, dtype = torch.device(device or like.device), dtype or like.dtype
        parts = [(control, found.key_map(unet.config))]
        load_parts(checkpoint, parts, IGNORED_BESIDE_CONTROL, torch.float32 if found.difference else dtype, device)
        if found.difference:
            control.add_encoder(unet)
            control.to(dtype)
        elif not same_decoder(checkpoint, unet):
            warnings.warn(
                f'"{path}" carries the base that it was trained with, and that is not the one in use: for the '
                "published result load the base from this file, too",
                stacklevel=2,
            )
        return control

    def save(
        self,
        path: str | Path,
        dtype: torch.dtype | None = None,
        layout: Layout = "ldm",
        difference_to: UNet | None = None,
    ) -> None:
        """Write a file in the original layout, or a new folder in diffusers'. `dtype` None keeps the parameters' own.

        With `difference_to` (original layout only) the file holds the copy minus the encoder of that base, marked as
        other programs mark it: loaded with another base of the family, the ControlNet is transferred to it.
        Raises CheckpointError for a folder that exists, and for an architecture that diffusers or a difference lacks.
        """
        unet = self.encoder.config
        metadata = {"config": json.dumps({"unet": asdict(unet), "control": asdict(self.config)})}
        if layout == "diffusers":
            values = control_values(unet, self.config)
            tensors = gather(self, diffusers_control_map(unet, self.config), dtype)
            save_control(path, values, tensors, metadata)
            return
        control, marks = self, {}
        if difference_to is not None:
            control, marks = copy.deepcopy(self), {"difference": torch.zeros(1)}
            control.add_encoder(difference_to, -1)
        tensors = gather(control, control_map(unet, self.config), dtype)
        save_checkpoint(path, tensors | marks, metadata)

    @torch.no_grad()
    def add_encoder(self, unet: UNet, factor: float = 1.0) -> None:
        """Add `factor` times the encoder of `unet` to the copy, in fp32 at least.

        copy + (encoder of another base - encoder of its own) is a ControlNet for the other base (the paper's Figure 12,
        made exact). Raises CheckpointError if this is no copy of such an encoder.
        """
        self.check_copied_from(unet)
        for own, other in zip(self.encoder.parameters(), unet.encoder.parameters(), strict=True):
            own.data = (own.float() + factor * other.to(own.device).float()).to(own.dtype)

    @torch.no_grad()
    def transfer(self, source: UNet, target: UNet) -> None:
        """From the base `source`, whose encoder this was copied from, to `target`, another one of its family.

        The copy moves by what distinguishes the encoders; between equal ones nothing changes. Raises CheckpointError if
        this is no copy of such an encoder.
        """
        self.check_copied_from(source)
        self.check_copied_from(target)
        encoders = (self.encoder, source.encoder, target.encoder)
        for own, old, new in zip(*(encoder.parameters() for encoder in encoders), strict=True):
            own.data = (own.float() + (new.float() - old.float()).to(own.device)).to(own.dtype)

    def check_copied_from(self, unet: UNet) -> None:
        """Raises CheckpointError if no copy of an encoder like that of `unet` is in here."""
        if self.config.architecture == "lite":
            raise CheckpointError(
                "a ControlNet-lite has no copy of its base's encoder to move or subtract: use it as is"
            )
        if self.encoder.config != unet.config:
            raise CheckpointError("the base is of another architecture than the ControlNet: give one of its family")


def same_decoder(checkpoint: Checkpoint, unet: UNet) -> bool:
    """Whether the base in a file, if there is one, is `unet`, by its decoder's biases and norms.

    ControlNet 1.0 was trained with the decoder unlocked for some of the files (its repository, issue 46).
    """
    parameters = dict(unet.named_parameters())  # those that are packed are no parameters any more
    sources = unet_map(unet.config).sources(parameters)
    for name, parameter in parameters.items():
        key = sources[name].key
        if name.startswith("decoder.") and parameter.ndim == 1 and key in checkpoint.tensors and not parameter.is_meta:
            if checkpoint.shape(key) != parameter.shape:
                return False
            stored = checkpoint.tensor(sources[name], parameter.dtype, parameter.device)
            if not torch.equal(stored, parameter):
                return False
    return True
