"""The transformer in which the image attends to itself and to the prompt: attention and a gated feed-forward network.

Shapes: B batch, N tokens of the image (h * w), M tokens of the prompt, C channels, D context width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import UNetConfig


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., arXiv 1706.03762) of x (B, N, C) to a context (B, M, D) -> (B, N, C).

    q, k and v have no bias, as in the released models. `heads` is their number. With `fp32_logits` the logits q k^T are
    fp32 on every device, also under autocast or with half-precision weights: SD 2.1's exceed the range of fp16.
    """

    def __init__(self, width: int, context_width: int, heads: int, fp32_logits: bool = False):
        super().__init__()
        self.heads = heads
        self.fp32_logits = fp32_logits
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(context_width, width, bias=False)
        self.v = nn.Linear(context_width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(context), self.v(context)
        q, k, v = (rearrange(y, "b n (heads c) -> b heads n c", heads=self.heads) for y in (q, k, v))
        return self.out(rearrange(self.attend(q, k, v), "b heads n c -> b n (heads c)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(c)) v for q (B, heads, N, c), k and v (B, heads, M, c) -> like q."""
        # CUDA's kernels, fused or not, compute logits in fp32 whatever q and k are; those of mps do not. Those of CPUs
        # do, but their backward pass takes two to three times as long in bf16 as in fp32.
        if self.fp32_logits and q.device.type != "cuda" and q.dtype != torch.float32:
            with torch.autocast(q.device.type, enabled=False):
                return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v)


class FeedForward(nn.Module):
    """GEGLU (Shazeer, arXiv 2002.05202): a value times the exact GELU of a gate, both from one projection."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 2 * 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.contract(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt and a feed-forward network, each on a pre-norm residual branch."""

    def __init__(self, width: int, context_width: int, heads: int, fp32_logits: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, heads, fp32_logits)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, context_width, heads, fp32_logits)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attention(y, y)
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map (B, C, h, w), with a residual connection around it.

    SD 1.x projects in and out with 1x1 convolutions, SD 2.x with linear layers: the same computation, with weights of
    different shapes. As in the released code, the norm's epsilon is 1e-6, against 1e-5 in the residual blocks.
    """

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        width, self.linear_projections = config.widths[level], config.linear_projections
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if self.linear_projections else nn.Conv2d(width, width, 1)
        self.block = TransformerBlock(width, config.context_width, config.heads[level], config.fp32_logits)
        self.proj_out = nn.Linear(width, width) if self.linear_projections else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        if self.linear_projections:
            y = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
            y = self.proj_out(self.block(y, context))
            return x + rearrange(y, "b (h w) c -> b c h w", h=height)
        y = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        y = rearrange(self.block(y, context), "b (h w) c -> b c h w", h=height)
        return x + self.proj_out(y)
