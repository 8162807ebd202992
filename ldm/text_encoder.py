"""The CLIP text transformer: token ids -> the context that the UNet attends to. SD 1.x has OpenAI's (Radford et al.,
arXiv 2103.00020), SD 2.x OpenCLIP's (Cherti et al., arXiv 2212.07143).

Shapes: B batch, M tokens of the prompt, D width of the text model.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import TextConfig


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of the GELU, with which its weights were trained."""
    return x * torch.sigmoid(1.702 * x)


class CausalAttention(nn.Module):
    """Multi-head self-attention (B, M, D) -> (B, M, D) in which each token sees itself and the tokens before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "b m (heads c) -> b heads m c", heads=self.heads) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b heads m c -> b m (heads c)"))


class MLP(nn.Module):
    """Two linear layers around a GELU: the quick one in OpenAI's models, the exact one in OpenCLIP's."""

    def __init__(self, width: int, quick: bool):
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.activation = quick_gelu if quick else F.gelu
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(x)))


class TextBlock(nn.Module):
    """Causal self-attention and an MLP, each on a pre-norm residual branch."""

    def __init__(self, width: int, heads: int, quick: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, quick)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Ids (B, M) -> context (B, M, D), layer-normalised.

    SD 1.x ("clip") uses the output of the last layer, SD 2.x ("open_clip") that of the one before it; the last layer of
    SD 2.x, its text projection and its logit scale are kept because the published files have them, but never used.
    There is no padding mask: as in the released code, padding is part of the prompt.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width, quick = config.width, config.family == "clip"
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.position_embedding = nn.Embedding(config.positions, width)
        self.blocks = nn.ModuleList(TextBlock(width, config.heads, quick) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(width)

        # CLIP's initialisation, for training from scratch: the default, std 1, would drown what the blocks add.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        if config.family == "open_clip":
            self.text_projection = nn.Parameter(torch.empty(width, width).normal_(std=width**-0.5))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Ids (B, M) with M <= `positions` -> (B, M, D): the output of a late layer, through the final norm.

        `clip_skip` counts the way users do: 1 is the layer that the published model uses, 2 the one before it, and so
        on. Later layers do not run. Raises ValueError for a layer that does not exist and for too many tokens.
        """
        layers = layers_to_run(self.config, clip_skip)
        if ids.shape[1] > self.config.positions:
            raise ValueError(f"{ids.shape[1]} tokens at once; this text model reads at most {self.config.positions}.")

        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, M, D)
        for block in self.blocks[:layers]:
            x = block(x)
        return self.final_norm(x)


def layers_to_run(config: TextConfig, clip_skip: int) -> int:
    """How many layers run, from the first. Raises ValueError if `clip_skip` names a layer that does not exist."""
    released = config.layers if config.family == "clip" else config.layers - 1  # SD 2.x reads the penultimate layer
    if not 1 <= clip_skip <= released:
        raise ValueError(f"clip_skip is {clip_skip}; this text model accepts 1 to {released}.")
    return released - clip_skip + 1
