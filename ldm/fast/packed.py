"""Locked weights in the order in which a CPU's kernels read them.

oneDNN, which computes convolutions on CPUs, wants weights in blocks that fit the processor's vectors. PyTorch keeps
them plain and has them brought into blocks at every call, which for small pictures takes longer than the convolution.
Packed weights are brought into blocks once, and linear layers then use oneDNN, too. Outputs are the same to rounding.

Shapes: B batch, C channels, G groups, S strips, h w positions.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.attention import Attention
from ldm.blocks import Upsample
from ldm.vae import AttentionBlock

from .onednn import attend, mkl_is_slow, multiply

LARGE = 128 * 128  # positions of a map


class Packed(nn.Module):
    """A module without gradients, whose weight is packed when it is first used: for the shape that comes in then. Other
    shapes are computed as well, but may be slower."""

    def _apply(self, fn, recurse=True):
        moved = fn(torch.zeros(1))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise ValueError("packed weights can neither leave the CPU nor change their type: load the model again")
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo):
        raise ValueError("packed weights cannot be copied, as into a ControlNet to train: copy before you pack")


class PackedLayer(Packed):
    def __init__(self, layer: nn.Conv2d | nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight.detach(), layer.bias

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


class PackedConv(PackedLayer):
    """nn.Conv2d, with channels last inside and outside: (B, C_in, h, w) -> (B, C_out, h', w')."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if not self.weight.is_mkldnn:
            plain = self.weight.contiguous().to_mkldnn()
            self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *self.geometry, x.shape)
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")


class PackedLinear(PackedLayer):
    """nn.Linear: (..., C_in) -> (..., C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.weight.is_mkldnn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), x.numel() // x.shape[-1])
        return multiply(x, self.weight, self.bias)


# By the rows of a kernel of 4 (first index) and of 3: which of the 3 meet the same position of a map that was doubled.
FOLDED = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


class PackedUpsample(Packed):
    """blocks.Upsample: (B, C, h, w) -> (B, C, 2 h, 2 w).

    On a map whose positions are doubled a 3x3 kernel meets 2x2 different values. So the weights that meet the same one
    are added beforehand, and the map need not be doubled: what is left is a transposed convolution with a 4x4 kernel
    and stride 2, with 16 products where there were 36. The plain weights stay, to be saved: sums cannot be undone.
    """

    GEOMETRY = ((1, 1), (0, 0), (2, 2), (1, 1), 1)  # padding, padding of the output, stride, dilation, groups

    def __init__(self, upsample: Upsample):
        super().__init__()
        self.conv = upsample.conv
        self.folded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if self.folded is None:
            rows = torch.tensor(FOLDED, dtype=torch.float32)
            plain = torch.einsum("ki, lj, ocij -> cokl", rows, rows, self.conv.weight).contiguous()
            self.folded = torch.ops.mkldnn._reorder_convolution_transpose_weight(plain, *self.GEOMETRY, x.shape)
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, self.folded, self.conv.bias, *self.GEOMETRY, "none", [], ""
        )


class ChannelsLastNorm(nn.GroupNorm):
    """nn.GroupNorm (B, C, h, w) -> the same, for channels last.

    There PyTorch adds a channel up over all positions in one fp32 sum, which on a map of 512x512 costs two digits. So
    large maps are normalised strip by strip, and the strips are then brought to the mean and deviation of the whole.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if h * w <= LARGE or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        s = math.gcd(h, 32)
        strips = rearrange(x, "b c (s h) w -> (b s) c h w", s=s)
        y, means, inverses = torch.native_group_norm(
            strips, None, None, b * s, c, h * w // s, self.num_groups, self.eps
        )  # (B S, C, h / S, w), (B S, G), (B S, G)
        means, deviations = (rearrange(z.double(), "(b s) g -> b s g", s=s) for z in (means, 1 / inverses))
        mean = means.mean(dim=1, keepdim=True)
        deviation = (deviations**2 + (means - mean) ** 2).mean(dim=1, keepdim=True).sqrt()  # (B, 1, G)
        scale, shift = (rearrange(z / deviation, "b s g -> (b s) g 1") for z in (deviations, means - mean))
        weight, bias = (rearrange(z, "(g c) -> g c", g=self.num_groups) for z in (self.weight, self.bias))
        for change, z in ((y.mul_, scale * weight), (y.add_, shift * weight + bias)):
            change(rearrange(z.float(), "bs g c -> bs (g c) 1 1"))
        return rearrange(y, "(b s) c h w -> b c (s h) w", s=s)


def pack(*networks: nn.Module) -> None:
    """Replaces the layers of networks that are only to be run and saved: they pass on no gradients.

    It comes last: a ControlNet is copied from a base, or loaded as a difference to one, before that base is packed. The
    autoencoder in strips (`low_memory` of `generate`) needs plain weights. Pack for one size and batch: weights are
    laid out for the first that comes, and others took up to 1.9 times as long. Nothing happens to layers that are not
    in fp32 or not on a CPU, or where PyTorch comes without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return
    kinds = {
        nn.Conv2d: PackedConv,
        nn.Linear: PackedLinear,
        nn.GroupNorm: ChannelsLastNorm,
        Upsample: PackedUpsample,
    }
    for network in networks:
        if isinstance(network, Attention | AttentionBlock) and can_be_packed(network) and mkl_is_slow():
            network.attend = attend
        for name, child in network.named_children():
            kind = kinds.get(type(child))
            if kind is None:
                pack(child)
            elif can_be_packed(child):
                setattr(network, name, kind(child))


def can_be_packed(layer: nn.Module) -> bool:
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in layer.parameters())
