"""Matrix products by oneDNN, for processors on which those of PyTorch are slow.

PyTorch takes its matrix products from MKL, which uses vectors of 512 bits on Intel's processors only: on others that
have them it runs at half the speed. Convolutions come from oneDNN, which uses them everywhere and has matrix products,
too. The results are the same to rounding.

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

QUERIES = 256  # at a time: their logits stay in the processor's cache
MANY_TOKENS = 1024  # from which on products take longer than their calls
FEW_ROWS = 64  # below which it takes longer to lay a weight out than to multiply with it


@cache
def mkl_is_slow() -> bool:
    """Whether this processor has wider vectors than MKL uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    wide = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and "GenuineIntel" not in processor


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear without gradients: (..., C_in), (C_out, C_in) -> (..., C_out).

    The weight is contiguous or packed: any other oneDNN multiplies, too, but up to a hundred times slower.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.scaled_dot_product_attention without gradients: q (B, heads, N, C), k and v (B, heads, M, C) -> like q."""
    if min(q.shape[2], k.shape[2]) < MANY_TOKENS:
        return F.scaled_dot_product_attention(q, k, v)
    y = torch.empty_like(q)
    for sample in zip(q, k, v, y, strict=True):
        for queries, keys, values, out in zip(*sample, strict=True):  # (N, C), (M, C), (M, C), (N, C)
            keys, values = (keys / math.sqrt(keys.shape[1])).contiguous(), values.t().contiguous()
            for some, out_of_some in zip(queries.split(QUERIES), out.split(QUERIES), strict=True):
                weights = multiply(some, keys).softmax(dim=-1)  # (some, M)
                out_of_some.copy_(multiply(weights, values))
    return y


class Product(torch.autograd.Function):
    """F.linear, as `multiply`, with its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        of_x = multiply(gradient, weight.t().contiguous()) if for_x else None
        rows, x_rows = gradient.flatten(0, -2), x.flatten(0, -2)  # (N, C_out), (N, C_in)
        of_weight = multiply(rows.t().contiguous(), x_rows.t().contiguous()) if for_weight else None
        of_bias = rows.sum(dim=0) if for_bias else None
        return of_x, of_weight, of_bias


class Linear(nn.Linear):
    """nn.Linear by `Product`, in fp32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() < FEW_ROWS or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return Product.apply(x, self.weight, self.bias)


def quicken(*networks: nn.Module) -> None:
    """Exchanges the linear layers of networks in fp32 that gradients go through, where this processor gains by it. They
    keep their parameters."""
    if mkl_is_slow():
        for network in networks:
            exchange(network)


def exchange(network: nn.Module) -> None:
    for name, child in network.named_children():
        if type(child) is nn.Linear:
            linear = Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
            linear.weight, linear.bias = child.weight, child.bias
            setattr(network, name, linear)
        else:
            exchange(child)
