"""Muon, an optimizer for small models that have to learn much from few images.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the scale of J. Liu et al.,
"Muon is scalable for LLM training" (arXiv 2502.16982), at which AdamW's learning rates fit.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Weights of one shape move together up to this many numbers, 16 MB: copies of all would take memory.
MOST_AT_ONCE = 1 << 22

# The layers that read or write data (latents, images, hints, tokens), by the ends of their names. Each row or column of
# their weights stands for a channel or a word of its own, so orthogonal updates make no sense there.
READING_OR_WRITING_DATA = (
    "encoder.blocks.0.conv",  # of the UNet and of a ControlNet
    "encoder.blocks.0",  # of a ControlNet-lite
    "hint_encoder.convs.0",
    "decoder.conv_out",  # of the UNet and of the autoencoder
    "encoder.conv_in",  # this and the next two of the autoencoder
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

    `named` are a network's `named_parameters()`: the names tell which weights are hidden. As with PyTorch's fused
    optimizers, a step changes nothing where the attribute `found_inf`, a scalar on the device, is 1.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float = 1e-2):
        named = list(named)
        self.hidden = {parameter for name, parameter in named if is_hidden_weight(name, parameter)}
        self.found_inf: Tensor | None = None
        defaults = dict(lr=lr, momentum=0.95, betas=(0.9, 0.999), weight_decay=weight_decay)
        super().__init__([parameter for _, parameter in named], defaults)

    def __setstate__(self, state: dict) -> None:
        """Ends `load_state_dict`, which leaves the numbers of steps on the CPU, where a GPU cannot read them."""
        super().__setstate__(state)
        for parameter, own in self.state.items():
            own.update({name: value.to(parameter.device) for name, value in own.items()})

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        for weights in alike(parameter for parameter in moved if parameter in self.hidden):
            self.muon(weights, group)
        self.adamw([parameter for parameter in moved if parameter not in self.hidden], group)

    def muon(self, weights: list[nn.Parameter], group: dict) -> None:
        """Nesterov momentum, orthogonalised, scaled to AdamW's typical root mean square of 0.2. For N weights of one
        shape at once: a GPU computes their products faster than it can be asked for N."""
        means = [self.of(weight, "mean") for weight in weights]
        gradients, lr = torch.stack([weight.grad for weight in weights]), group["lr"]
        if self.found_inf is not None:  # then the means stay as they are, and the step's length is zero
            gradients, lr = torch.where(self.found_inf > 0, torch.stack(means), gradients), lr * (1 - self.found_inf)
        torch._foreach_lerp_(means, gradients.unbind(), 1 - group["momentum"])
        updates = gradients.lerp_(torch.stack(means), group["momentum"])  # (N, O, I) or (N, O, I, H, W)
        matrices = updates if updates.ndim == 3 else rearrange(updates, "n o i h w -> n o (h w i)")
        updates = lr * 0.2 * max(matrices.shape[1:]) ** 0.5 * orthogonal(matrices)
        if weights[0].ndim == 4:
            height, width = weights[0].shape[2:]
            updates = rearrange(updates, "n o (h w i) -> n o i h w", h=height, w=width)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(weights, updates.unbind())

    def adamw(self, parameters: list[nn.Parameter], group: dict) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [self.of(parameter, "mean") for parameter in parameters],
            [self.of(parameter, "square") for parameter in parameters],
            [],
            [self.of(parameter, "step") for parameter in parameters],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )

    def of(self, parameter: nn.Parameter, name: str) -> Tensor:
        """A parameter's mean or square, or how many steps it has taken."""
        state = self.state[parameter]
        if name not in state:
            state[name] = parameter.new_zeros(()) if name == "step" else torch.zeros_like(parameter)
        return state[name]


def alike(weights: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Lists of weights of one shape, with at most MOST_AT_ONCE numbers each, unless a single weight has more."""
    shapes = defaultdict(list)
    for weight in weights:
        shapes[weight.shape].append(weight)
    for shape, same in shapes.items():
        count = max(MOST_AT_ONCE // shape.numel(), 1)
        yield from (same[i : i + count] for i in range(0, len(same), count))


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, O, I) -> for each nearly U V^T of its singular value decomposition U S V^T, with singular values of about 0.7
    to 1.2.

    Five steps of Newton and Schulz's iteration, with Jordan's coefficients; on CUDA in bf16, as his, which is ten times
    as fast there.
    """
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)
