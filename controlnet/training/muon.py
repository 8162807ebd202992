"""Muon, an optimizer for small models that have to learn much from few images.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the scale of J. Liu et al.,
"Muon is scalable for LLM training" (arXiv 2502.16982), at which AdamW's learning rates fit.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

# The layers that read or write data (latents, images, hints, tokens), by the ends of their names. Each row or column of
# their weights stands for a channel or a word of its own, so orthogonal updates make no sense there.
READING_OR_WRITING_DATA = (
    "encoder.blocks.0.conv",  # of the UNet and of a ControlNet
    "encoder.blocks.0",  # of a ControlNet-lite
    "hint_encoder.convs.0",
    "decoder.conv_out",
    "encoder.conv_in",  # these and the one above, of the autoencoder
    "encoder.conv_out",
    "decoder.conv_in",
    "token_embedding",
    "position_embedding",
)


def is_hidden_weight(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix or a kernel between a network's layers; biases and norms are neither."""
    layer = name.removesuffix(".weight")
    return parameter.ndim >= 2 and not f".{layer}".endswith(tuple(f".{end}" for end in READING_OR_WRITING_DATA))


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for hidden weights, AdamW for all other parameters.

    `named` are a network's `named_parameters()`: the names tell which weights are hidden.
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
        self.hidden = {parameter for name, parameter in named if is_hidden_weight(name, parameter)}
        defaults = dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay)
        super().__init__([parameter for _, parameter in named], defaults)

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                update = self.muon if parameter in self.hidden else self.adam
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update(parameter, group), alpha=group["lr"])

    def muon(self, parameter: nn.Parameter, group: dict) -> Tensor:
        """Nesterov momentum, orthogonalised, scaled to AdamW's typical root mean square of 0.2."""
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        mean = state["mean"]
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
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        deviation = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8)
        return state["mean"].div(1 - beta1 ** state["step"]).div_(deviation)


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
