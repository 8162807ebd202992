"""What a LoRA adds to one weight, by the kinds that are in use.

LoRA, and LoCon for convolutions      up down; with a core, up (core) down: Tucker decomposition
LoHa (as FedPara, arXiv 2108.06098)   (w1_a w1_b) * (w2_a w2_b), entry by entry
LoKr (as KronA, arXiv 2212.10650)     w1 (x) w2, Kronecker's product; each of them may be a product itself
DoRA (arXiv 2402.09353)               any of them, and then each row or column brought to a length that was learned

LoCon, LoHa and LoKr are LyCORIS' (arXiv 2309.14859).

Shapes: O output and I input channels, r rank; a convolution's kernel h w is flattened into its input, (O, I h w).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .stored import StoredTensor

FACTORS = (  # a change has all of one row, and perhaps some of the next
    ({"down", "up"}, {"mid"}),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}),
    (set(), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
LENGTHS = {"dora_scale", "magnitude"}


class Misshapen(Exception):
    """A change that does not fit its weight, or is not complete."""


@dataclass(frozen=True)
class Change:
    """Of one weight, at strength 1; the factors are read when they are used."""

    factors: dict[str, StoredTensor]
    alpha: float | None  # None: as large as the rank

    @classmethod
    def from_tensors(cls, tensors: dict[str, StoredTensor], described_alpha: float | None = None) -> "Change":
        """Of a weight's tensors by their roles. The file's alpha comes before one that is described elsewhere.

        Raises Misshapen for what makes no change.
        """
        factors = {role: tensor for role, tensor in tensors.items() if role != "alpha"}
        found = factors.keys() - LENGTHS
        if not found or not any(all_of <= found <= all_of | some_of for all_of, some_of in FACTORS):
            raise Misshapen(f"it has {', '.join(sorted(tensors))}")
        if not all(tensor.dtype.is_floating_point for tensor in factors.values()):
            raise Misshapen("it is not of a floating-point type")
        alpha = tensors.get("alpha")
        if alpha is None:
            return cls(factors, described_alpha)
        if alpha.numel != 1:
            raise Misshapen(f"its alpha has {alpha.numel} numbers")
        return cls(factors, alpha.load(torch.float64).item())

    def check(self, weight: Tensor) -> None:
        """By the formula itself, on shapes alone. Raises Misshapen if it does not give the weight's shape."""
        try:
            self.compute(weight.to("meta", torch.float32), lambda factor: torch.empty(factor.shape, device="meta"))
        except (RuntimeError, IndexError, KeyError, TypeError, ArithmeticError) as error:
            raise Misshapen(
                f"it is {', '.join(f'{list(f.shape)} ({role})' for role, f in self.factors.items())}"
            ) from error

    def of(self, weight: Tensor) -> Tensor:
        """What is added to a weight (O, I) or (O, I, h, w) in fp32: of the same shape."""
        return self.compute(weight, lambda factor: factor.load(torch.float32, weight.device))

    def compute(self, weight: Tensor, load: Callable[[StoredTensor], Tensor]) -> Tensor:
        f = {role: load(factor) for role, factor in self.factors.items()}
        matrix, rank = low_rank(f)
        scale = 1.0 if self.alpha is None or rank is None else self.alpha / rank
        if matrix.shape != weight.flatten(1).shape:
            raise Misshapen(f"it makes {list(matrix.shape)}")
        change = scale * matrix.reshape(weight.shape)
        if "magnitude" in f:  # PEFT's, always of the output channels
            return with_lengths(weight + change, f["magnitude"], of_output=True) - weight
        if "dora_scale" in f:
            of_output = len(f["dora_scale"]) == len(weight)
            return with_lengths(weight + change, f["dora_scale"], of_output) - weight
        return change


def low_rank(f: dict[str, Tensor]) -> tuple[Tensor, int | None]:
    """-> the change before its scale (O, I h w), and its rank; None where the scale is 1."""
    if "down" in f:
        return product(f["up"], f["down"], f.get("mid")), len(f["down"])
    if "hada_w1_a" in f:
        return half(f, "hada_w1", "hada_t1") * half(f, "hada_w2", "hada_t2"), len(f["hada_w1_b"])
    ranks = [len(f[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in f]
    return torch.kron(half(f, "lokr_w1"), half(f, "lokr_w2", "lokr_t2")), ranks[0] if ranks else None


def half(f: dict[str, Tensor], name: str, core_name: str = "") -> Tensor:
    """One of the two matrices of a LoHa or LoKr: as it is, or the product that it is stored as."""
    if name in f:
        return f[name].flatten(1)
    core = f.get(core_name)
    a = f[f"{name}_a"]
    return product(a if core is None else a.T, f[f"{name}_b"], core)  # with a core LyCORIS stores (r, O)


def product(up: Tensor, down: Tensor, core: Tensor | None) -> Tensor:
    """(O, r) and (r, I), with a core (r, r, h, w) between them or none -> (O, I h w)."""
    up, down = up.flatten(1), down.flatten(1)
    if core is None:
        return up @ down
    return torch.einsum("o r, r s h w, s i -> o i h w", up, core, down).flatten(1)


def with_lengths(weight: Tensor, lengths: Tensor, of_output: bool) -> Tensor:
    """A weight whose rows (of its output channels), or columns, are brought to these lengths."""
    others = [i for i in range(weight.ndim) if i != (0 if of_output else 1)]
    norms = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight * (lengths.reshape(norms.shape) / norms)
