"""One optimiser step: precision, accumulation, clipping, learning rate. The same code on a CPU and on CUDA."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .devices import PRECISIONS


def constant_rate(warmup: int) -> Callable[[int], float]:
    """Linear warm-up over the first steps, then 1: a factor to the learning rate as a function of the step."""
    return lambda step: min((step + 1) / max(warmup, 1), 1.0)


def cosine_rate(warmup: int, steps: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine from 1 down to 0 at `steps`."""
    return lambda step: min((step + 1) / max(warmup, 1), 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))


class Optimisation:
    """AdamW on fp32 parameters with autocast around the forward pass and, for fp16, scaled losses.

        for batch in micro_batches:
            with optimisation.autocast():
                loss = ...
            optimisation.backward(loss / len(micro_batches))
        optimisation.step()

    Gradients add up over any number of `backward` calls until `step`, which scales them down to the norm `clip`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        rate: Callable[[int], float],
        device: torch.device,
        precision: str = "fp32",
        clip: float = math.inf,
    ):
        self.parameters = list(parameters)
        self.device, self.dtype, self.lr, self.clip = device, PRECISIONS[precision], lr, clip
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-2, fused=True)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        # fp16 gradients below 6e-8 would vanish: the scaler multiplies the loss and divides the gradients again.
        # Disabled, every call on it passes through, so the loop has no branches for precision.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> float:
        """Updates the parameters and returns the gradients' norm before clipping.

        A step whose fp16 gradients overflowed changes nothing but the loss scale (the norm is then not finite). In
        fp32 and bf16 nothing would catch that: raises FloatingPointError before the parameters change.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if not self.scaler.is_enabled() and not norm.isfinite():
            raise FloatingPointError(
                "the gradients are not finite numbers: resume from the last save with a lower rate"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.rate.step()
        return norm.item()

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict) -> None:
        """Everything but the learning rate, which stays what this run asks for."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.rate.base_lrs = [self.lr]
        (group,) = self.optimizer.param_groups
        group["initial_lr"], group["lr"] = self.lr, self.lr * self.rate.lr_lambdas[0](self.rate.last_epoch)

    def _parts(self) -> dict:
        return {"optimizer": self.optimizer, "rate": self.rate, "scaler": self.scaler}
