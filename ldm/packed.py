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

LARGE = 128 * 128  # positions of a map


class Packed(nn.Module):
    """A layer without gradients, whose weight is packed when it is first used: for the shape that comes in then. Other
    shapes are computed as well, but may be slower."""

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight.detach(), layer.bias

    def _apply(self, fn, recurse=True):
        moved = fn(torch.zeros(1))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise ValueError("packed weights can neither leave the CPU nor change their type: load the model again")
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo):
        raise ValueError("packed weights cannot be copied, as into a ControlNet to train: copy before you pack")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


class PackedConv(Packed):
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


class PackedLinear(Packed):
    """nn.Linear: (..., C_in) -> (..., C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.weight.is_mkldnn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), x.numel() // x.shape[-1])
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


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
    autoencoder in strips (`low_memory` of `generate`) needs plain weights. Nothing happens to layers that are not in
    fp32 or not on a CPU, or where PyTorch comes without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return
    kinds = {nn.Conv2d: PackedConv, nn.Linear: PackedLinear, nn.GroupNorm: ChannelsLastNorm}
    for network in networks:
        for name, child in network.named_children():
            kind = kinds.get(type(child))
            if kind is None:
                pack(child)
            elif child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
                setattr(network, name, kind(child))
