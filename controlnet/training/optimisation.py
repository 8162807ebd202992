"""One optimizer step: precision, accumulation, clipping, learning rate. The same code on a CPU and on CUDA."""

import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from controlnet.common.devices import PRECISIONS, optional

from .later import Later
from .lr_schedules import LRSchedule, lr_schedule_of
from .muon import Muon
from .options import TrainSettings

# After this many steps in a row without finite gradients the run is lost. In fp16 the loss scale starts at 2^16 and is
# halved after each, so a few at the start are normal.
MOST_SKIPPED = 20


@torch.no_grad()
def update_ema(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """An exponential moving average that after n updates decays by (1 + n) / (10 + n) at most, and is the model itself
    after the first: a short run's average would otherwise mostly be what the weights were at its start.

    AveragedModel's own `update_parameters` would have the CPU wait for a GPU.
    """
    n = int(average.n_averaged)  # on the CPU
    kept = min(decay, (1 + n) / (10 + n)) if n else 0.0
    torch._foreach_lerp_(list(average.module.parameters()), list(model.parameters()), 1 - kept)
    average.n_averaged += 1


class Optimisation:
    """An optimizer of fp32 parameters with autocast around the forward pass and, for fp16, scaled losses.

        for batch in micro_batches:
            with optimisation.autocast():
                loss = ...
            optimisation.backward(loss / len(micro_batches))
        norm = optimisation.update()
        optimisation.finish(norm)

    Gradients add up over any number of `backward` calls until `update`, which scales them down to the norm `clip`. No
    method waits for a GPU, except `update` with adamw8bit. With the others `backward` and `update` can be recorded as a
    CUDA graph, after `prepare_recording`; `finish` is the CPU's part of a step.
    `named` are as from `named_parameters()`: errors name the layer. `optimizer` and `shard` are as in `new_optimizer`.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        lr_schedule: LRSchedule,
        device: torch.device,
        precision: str = "fp32",
        clip: float = math.inf,
        optimizer: str = "adamw",
        shard: bool = False,
    ):
        named = list(named)
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.device, self.dtype, self.lr, self.clip = device, PRECISIONS[precision], lr, clip
        self.optimizer, self.sharded = new_optimizer(optimizer, named, lr, shard), shard
        self.own = self.optimizer.optim if shard else self.optimizer  # of this process
        self.stays_on_device = optimizer != "adamw8bit"
        self.lr_schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_schedule)
        # fp16 gradients below 6e-8 would vanish: the scaler multiplies the loss and divides the gradients again.
        # Disabled, every call on it passes through, so the loop has no branches for precision.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.parts = {"optimizer": self.optimizer, "lr_schedule": self.lr_schedule, "scaler": self.scaler}
        self.skipped_in_a_row = 0
        self.last_norm: Later | None = None

    @classmethod
    def from_settings(
        cls, named: Iterable[tuple[str, nn.Parameter]], settings: TrainSettings, device: torch.device
    ) -> "Optimisation":
        shard = settings.shard and torch.distributed.is_initialized()
        precision, clip, optimizer = settings.precision, settings.clip, settings.optimizer
        return cls(named, settings.lr, lr_schedule_of(settings), device, precision, clip, optimizer, shard)

    @property
    def current_lr(self) -> float:
        """The learning rate of the next step."""
        (factor,) = self.lr_schedule.lr_lambdas
        return self.lr * factor(self.lr_schedule.last_epoch)

    def prepare_recording(self) -> None:
        """From now on the learning rate is a number on the device, where recorded `update`s read it; until a state is
        loaded, which makes it a number of Python again."""
        (group,) = self.optimizer.param_groups
        if not isinstance(group["lr"], Tensor):  # else it is the one that an earlier graph reads
            group["lr"] = torch.tensor(self.current_lr, device=self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> Tensor:
        """Updates the parameters and returns the gradients' norm before clipping, a scalar on the device.

        Where that norm is not finite the step is skipped: the parameters stay as they are, and in fp16 the scale of the
        loss is halved. Raises FloatingPointError, with the layer's name, soon after MOST_SKIPPED in a row.
        """
        self.scaler.unscale_(self.optimizer)
        if self.in_doubt and (problem := not_finite(self.names, self.parameters)):
            raise FloatingPointError(problem)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        if self.stays_on_device:  # a fused one, which leaves everything as it is where `found_inf` is 1
            self.own.found_inf = 1 - norm.isfinite().float()
            if isinstance(self.own, torch.optim.AdamW):  # refuses to be recorded without it, and else warns of it
                (group,) = self.optimizer.param_groups
                group["capturable"] = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def finish(self, norm: Tensor) -> Tensor:
        """Counts skipped steps and goes on in the learning rate's schedule, after the `update` that gave this norm ->
        the norm."""
        if self.last_norm is not None:  # of the step before: by now it has arrived
            (before,) = self.last_norm.read()
            self.skipped_in_a_row = 0 if math.isfinite(before) else self.skipped_in_a_row + 1
        self.last_norm = Later(norm)
        with warnings.catch_warnings(category=UserWarning, action="ignore"):  # that a first step was skipped
            self.lr_schedule.step()
        return norm

    @property
    def in_doubt(self) -> bool:
        """Whether the next `update` has to look for what is wrong with its gradients, which no recorded one does."""
        return self.skipped_in_a_row >= MOST_SKIPPED

    def gather(self) -> None:
        """Collects what is sharded. All processes call it before the main one's `state_dict`."""
        if self.sharded:
            self.optimizer.consolidate_state_dict(to=0)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        """Everything but the learning rate, which stays what this run asks for."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.lr_schedule.base_lrs = [self.lr]
        (group,) = self.optimizer.param_groups
        group["initial_lr"], group["lr"] = self.lr, self.current_lr


def new_optimizer(
    name: str, named: list[tuple[str, nn.Parameter]], lr: float, shard: bool = False
) -> torch.optim.Optimizer:
    """ "adamw" (Loshchilov and Hutter, arXiv 1711.05101), "muon", or "adamw8bit", which keeps the moments in 8 bits
    each (Dettmers et al., arXiv 2110.02861) and needs the package bitsandbytes.

    With `shard` each of several processes keeps AdamW's moments of some parameters, updates these and sends them to the
    others (ZeRO, stage 1: Rajbhandari et al., arXiv 1910.02054): the same numbers as without.
    """
    if name == "muon":
        return Muon(named, lr)
    parameters = [parameter for _, parameter in named]
    if name == "adamw8bit":
        adamw = optional("bitsandbytes.optim", "the 8-bit optimizer").AdamW8bit
        optimizer = adamw(parameters, lr=lr, weight_decay=1e-2)
        optimizer.register_step_post_hook(restore_channels_last(parameters))
        return optimizer
    settings = dict(lr=lr, weight_decay=1e-2, fused=True)
    if not shard:
        return torch.optim.AdamW(parameters, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **settings)


def restore_channels_last(parameters: list[nn.Parameter]) -> Callable[..., None]:
    """-> a hook after an optimizer's step, for bitsandbytes: it makes what it updates contiguous, while convolutions
    are laid out channels last (prepare.py)."""
    last = [p for p in parameters if p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)]

    def hook(*_) -> None:
        for parameter in last:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    return hook


def not_finite(names: list[str], parameters: list[nn.Parameter]) -> str | None:
    """A sentence about the gradients of the next step; None if all are finite, and the run is not lost. Bad values
    spread from the end of the network to its beginning, so the last layer that has any is the cause."""
    known = [(name, p.grad) for name, p in zip(names, parameters, strict=True) if p.grad is not None]
    bad = [name for name, gradient in known if not gradient.norm().isfinite()]
    if not bad:
        return None
    where = "those of all layers, so the loss is not" if len(bad) == len(known) else f"the last layer is {bad[-1]}"
    return (
        f"the gradients of {MOST_SKIPPED} steps in a row are not finite numbers ({where}): "
        "resume from the last save with a lower --lr"
    )
