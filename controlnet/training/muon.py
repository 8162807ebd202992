"""Muon, an optimiser for small models that have to learn much from few pictures.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the scale of J. Liu et al.,
"Muon is scalable for LLM training" (arXiv 2502.16982), at which AdamW's learning rates fit.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Steps of momentum made orthogonal for the weights between a network's layers, AdamW for all else.

    `named` are a network's `named_parameters()`: biases and norms are no matrices, and embeddings and the first and
    last convolution, whose rows or columns mean something each, are better left to AdamW.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
    ):
        named = list(named)
        outer = ("embedding", "conv_in", "conv_out")
        self.inner = {p for name, p in named if p.ndim >= 2 and not any(part in name for part in outer)}
        defaults = dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay)
        super().__init__([parameter for _, parameter in named], defaults)

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                update = self.muon if parameter in self.inner else self.adam
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update(parameter, group), alpha=group["lr"])

    def muon(self, parameter: nn.Parameter, group: dict) -> Tensor:
        """Nesterov's momentum, orthogonal, with AdamW's usual deviation of 0.2 for each number."""
        mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
        mean.lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(mean, group["momentum"])
        if update.ndim == 4:
            matrix = orthogonal(rearrange(update, "o i h w -> o (h w i)"))
            update = rearrange(matrix, "o (h w i) -> o i h w", h=update.shape[2], w=update.shape[3])
        else:
            matrix = update = orthogonal(update)
        return update * (0.2 * max(matrix.shape) ** 0.5)

    def adam(self, parameter: nn.Parameter, group: dict) -> Tensor:
        """Kingma and Ba, arXiv 1412.6980, Algorithm 1."""
        state = self.state[parameter]
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        square = state.setdefault("square", torch.zeros_like(parameter))
        state["step"] = state.get("step", 0) + 1
        slow, slower = group["betas"]
        mean.lerp_(parameter.grad, 1 - slow)
        square.lerp_(parameter.grad.square(), 1 - slower)
        deviation = (square / (1 - slower ** state["step"])).sqrt_()
        return mean / (1 - slow ** state["step"]) / (deviation + 1e-8)


def orthogonal(matrix: Tensor) -> Tensor:
    """(M, N) -> nearly U V^T of its singular value decomposition U S V^T, with singular values of about 0.7 to 1.2.

    Five steps of Newton and Schulz's iteration, with Jordan's coefficients.
    """
    x = matrix / (matrix.norm() + 1e-7)
    if tall := len(x) > x.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x
