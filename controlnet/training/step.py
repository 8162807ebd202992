"""What the device does in an optimizer step: the gradients of one batch or, accumulated, of a few, and the update."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from controlnet.common.graphs import recorded

from .distributed import Process
from .optimisation import Optimisation


class Step:
    """A step of `optimisation` down the gradients of `loss`, as `process` has wrapped it.

    With `record`, on a single GPU, a step of one batch is replayed as a CUDA graph from its second time on: at four
    images of 512x512 the kernels of SD 1.5 take a CPU longer to ask for than an H200 to compute.
    """

    def __init__(
        self, loss: nn.Module, optimisation: Optimisation, process: Process, accumulate: int = 1, record: bool = True
    ):
        self.loss, self.optimisation, self.process, self.accumulate = loss, optimisation, process, accumulate
        # What waits for other processes or, as adamw8bit does, for the CPU cannot be recorded.
        can_record = record and process.world_size == accumulate == 1 and optimisation.can_skip
        self.replayed = recorded(self.complete, process.device) if can_record else self.complete
        if self.replayed != self.complete:
            optimisation.prepare_recording()

    def __call__(self, next_inputs: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """Takes the loss's inputs from `next_inputs`, batch by batch -> the mean loss and the norm of the gradients.
        The device may still be computing both.

        Raises FloatingPointError as `Optimisation.step` does.
        """
        total = sum(self.add_gradients(next_inputs(), last=False) for _ in range(self.accumulate - 1))
        complete = self.complete if self.optimisation.in_doubt else self.replayed
        loss, norm = complete(*next_inputs())
        return self.process.mean(total + loss), self.optimisation.finish(norm)

    def complete(self, *inputs: Tensor) -> Tensor:
        """The gradients of the last batch and the update -> (2,): its part of the loss, and the gradients' norm."""
        loss = self.add_gradients(inputs, last=True)
        return torch.stack([loss, self.optimisation.update()])

    def add_gradients(self, inputs: tuple[Tensor, ...], last: bool) -> Tensor:
        """-> a batch's part of the mean loss."""
        with self.process.accumulating(self.loss, last):
            with self.optimisation.autocast():
                loss = self.loss(*inputs) / self.accumulate
            self.optimisation.backward(loss)
        return loss.detach()
