"""Matrix products by oneDNN, for processors on which PyTorch's own are slow.

PyTorch's matrix products come from MKL, which uses 512-bit vectors on Intel's processors only and runs at half speed on
others that have them. oneDNN, PyTorch's library for convolutions, uses them everywhere and has matrix products too. The
results agree up to rounding.

Shapes: B batch, N rows or queries, M keys, C channels.
"""

import math
import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

QUERIES = 256  # at a time, so that their logits stay in the processor's cache
MIN_TOKENS = 1024  # below this, the calls take longer than the products
MIN_ROWS = 64  # below this, reordering the weight costs more than multiplying


@cache
def mkl_is_slow() -> bool:
    """Whether this processor has wider vectors than MKL uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    wide = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and "GenuineIntel" not in processor


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear without gradients: (..., C_in), (C_out, C_in) -> (..., C_out).

    The weight must be contiguous or packed: with any other layout oneDNN is up to a hundred times slower.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.scaled_dot_product_attention without gradients: q (B, heads, N, C), k and v (B, heads, M, C) -> like q."""
    if min(q.shape[2], k.shape[2]) < MIN_TOKENS:
        return F.scaled_dot_product_attention(q, k, v)
    y = torch.empty_like(q)
    for sample in zip(q, k, v, y, strict=True):
        for queries, keys, values, out in zip(*sample, strict=True):  # (N, C), (M, C), (M, C), (N, C)
            keys, values = (keys / math.sqrt(keys.shape[1])).contiguous(), values.t().contiguous()
            for some, out_of_some in zip(queries.split(QUERIES), out.split(QUERIES), strict=True):
                weights = multiply(some, keys).softmax(dim=-1)  # (some, M)
                out_of_some.copy_(multiply(weights, values))
    return y


class LinearFunction(torch.autograd.Function):
    """F.linear by `multiply`, with gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = multiply(grad, weight.t().contiguous()) if needs_x else None
        rows, x_rows = grad.flatten(0, -2), x.flatten(0, -2)  # (N, C_out), (N, C_in)
        grad_weight = multiply(rows.t().contiguous(), x_rows.t().contiguous()) if needs_weight else None
        grad_bias = rows.sum(dim=0) if needs_bias else None
        return grad_x, grad_weight, grad_bias


class Linear(nn.Linear):
    """nn.Linear through oneDNN, for fp32 on a CPU; PyTorch's own for few rows and under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() < MIN_ROWS or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return LinearFunction.apply(x, self.weight, self.bias)


def use_onednn_linear(*networks: nn.Module) -> None:
    """Replaces the linear layers of fp32 networks that are trained or backpropagated through, if that is faster on this
    processor. The parameters remain the same objects, under the same names."""
    if mkl_is_slow():
        for network in networks:
            replace_linear(network)


def replace_linear(network: nn.Module) -> None:
    for name, child in network.named_children():
        if type(child) is nn.Linear:
            linear = Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
            linear.weight, linear.bias = child.weight, child.bias
            setattr(network, name, linear)
        else:
            replace_linear(child)
