"""What the device does in an optimizer step: the gradients of one batch or, accumulated, of a few, and the update."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from controlnet.common.graphs import recorded

from .distributed import Process
from .optimisation import Optimisation


class Step:
    """One optimizer step on `loss`, the module that `process.wrap_ddp` returned.

    With `record`, on a single GPU, a step of one batch is replayed as a CUDA graph from its second time on: to launch
    the kernels of SD 1.5 for four images of 512x512 takes a CPU longer than an H200 needs to run them.
    """

    def __init__(
        self, loss: nn.Module, optimisation: Optimisation, process: Process, accumulate: int = 1, record: bool = True
    ):
        self.loss, self.optimisation, self.process, self.accumulate = loss, optimisation, process, accumulate
        # What waits for other processes or, as adamw8bit does, for the CPU cannot be recorded.
        can_record = record and process.world_size == accumulate == 1 and optimisation.stays_on_device
        compute = self.last_batch_and_update
        self.replayed = recorded(compute, process.device) if can_record else compute
        if self.replayed is not compute:  # as on CUDA
            optimisation.prepare_recording()

    def __call__(self, next_inputs: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """Takes the loss's inputs from `next_inputs`, batch by batch -> the mean loss and the norm of the gradients.
        The device may still be computing both.

        Raises FloatingPointError as `Optimisation.update` does.
        """
        total = sum(self.add_gradients(next_inputs(), last=False) for _ in range(self.accumulate - 1))
        # A step in doubt is not replayed: it looks at its gradients on the way.
        compute = self.last_batch_and_update if self.optimisation.in_doubt else self.replayed
        loss, norm = compute(*next_inputs())
        return self.process.mean(total + loss), self.optimisation.finish(norm)

    def last_batch_and_update(self, *inputs: Tensor) -> Tensor:
        """-> (2,): the last batch's part of the loss, and the gradients' norm."""
        loss = self.add_gradients(inputs, last=True)
        return torch.stack([loss, self.optimisation.update()])

    def add_gradients(self, inputs: tuple[Tensor, ...], last: bool) -> Tensor:
        """-> a batch's part of the mean loss."""
        with self.process.accumulating(self.loss, last):
            with self.optimisation.autocast():
                loss = self.loss(*inputs) / self.accumulate
            self.optimisation.backward(loss)
        return loss.detach()
