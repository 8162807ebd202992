"""Locked weights, reordered once into the layout that CPU kernels read.

oneDNN, PyTorch's library for convolutions on CPUs, wants weights in blocks that fit the processor's vectors. PyTorch
stores them in plain order and has them reordered at every call, which for small images takes longer than the
convolution. Packed weights are reordered once; linear layers then use oneDNN too. Outputs agree up to rounding.

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

LARGE = 128 * 128  # positions of a feature map


class Packed(nn.Module):
    """A module without gradients; it packs its weight on the first call, for that input shape. Other shapes work too,
    but may be slower."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():  # it would get none, with no more than a warning
            raise ValueError("packed weights pass on no gradients: load the model again to train or differentiate it")
        return super().__call__(x)

    def _apply(self, fn, recurse=True):
        moved = fn(torch.zeros(1))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise ValueError("packed weights can neither leave the CPU nor change their dtype: load the model again")
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo):
        raise ValueError("packed weights cannot be copied, for example into a ControlNet: copy before you pack")


class PackedLayer(Packed):
    def __init__(self, layer: nn.Conv2d | nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight.detach(), layer.bias

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


class PackedConv(PackedLayer):
    """nn.Conv2d with channels-last output: (B, C_in, h, w) -> (B, C_out, h', w')."""

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


# FOLDED[k][i] is 1 if row i of the 3x3 kernel feeds row k of the 4x4 kernel.
FOLDED = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


class PackedUpsample(Packed):
    """blocks.Upsample: (B, C, h, w) -> (B, C, 2 h, 2 w).

    On a map enlarged by nearest neighbour, a 3x3 kernel sees only 2x2 different values. Adding up the weights that see
    the same value turns both steps into one transposed convolution of the small map, with a 4x4 kernel and stride 2:
    16 products for each input position instead of 36. The plain weights stay, for saving: sums cannot be undone.
    """

    GEOMETRY = ((1, 1), (0, 0), (2, 2), (1, 1), 1)  # padding, output padding, stride, dilation, groups

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
    """nn.GroupNorm for channels-last maps: (B, C, h, w) -> the same shape.

    PyTorch sums each channel of such a map over all positions in a single fp32 accumulator, which at 512x512 loses two
    digits. Large maps are therefore normalised in horizontal strips, whose statistics are combined in fp64.
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
        y, means, inverse_stds = torch.native_group_norm(
            strips, None, None, b * s, c, h * w // s, self.num_groups, self.eps
        )  # (B S, C, h / S, w), (B S, G), (B S, G)
        means, stds = (rearrange(z.double(), "(b s) g -> b s g", s=s) for z in (means, 1 / inverse_stds))
        mean = means.mean(dim=1, keepdim=True)  # of the whole map
        std = (stds**2 + (means - mean) ** 2).mean(dim=1, keepdim=True).sqrt()  # (B, 1, G)
        scale, shift = (rearrange(z / std, "b s g -> (b s) g 1") for z in (stds, means - mean))
        weight, bias = (rearrange(z, "(g c) -> g c", g=self.num_groups) for z in (self.weight, self.bias))
        y.mul_(rearrange((scale * weight).float(), "bs g c -> bs (g c) 1 1"))
        y.add_(rearrange((shift * weight + bias).float(), "bs g c -> bs (g c) 1 1"))
        return rearrange(y, "(b s) c h w -> b c (s h) w", s=s)


def pack(*networks: nn.Module) -> None:
    """Replaces the layers of networks that will only be run and saved: packed layers pass on no gradients.

    Pack last: a packed base cannot be copied into a ControlNet. The tiled VAE needs plain weights. Weights are laid out
    for the first shape seen (size and batch); others are up to 1.9x slower. Layers that are not fp32 on a CPU are left
    alone, and so is everything if PyTorch was built without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return
    kinds = {nn.Conv2d: PackedConv, nn.Linear: PackedLinear, nn.GroupNorm: ChannelsLastNorm, Upsample: PackedUpsample}
    for network in networks:
        if isinstance(network, Attention | AttentionBlock) and can_be_packed(network) and mkl_is_slow():
            network.attend = attend  # in place of the method
        for name, child in network.named_children():
            kind = kinds.get(type(child))
            if kind is None:
                pack(child)
            elif can_be_packed(child):
                setattr(network, name, kind(child))


def can_be_packed(layer: nn.Module) -> bool:
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in layer.parameters())
