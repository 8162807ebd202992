"""Numbers that a GPU is still computing, read without holding it up."""

import torch
from torch import Tensor


class Later:
    """Numbers on their way to the CPU. `read` waits until they are there, but not for what was started since, as
    `item` would: a loop that reads those of the step before never lets the GPU run dry."""

    def __init__(self, *numbers: Tensor):
        stacked = torch.stack([number.detach() for number in numbers])
        self.numbers = stacked.to("cpu", non_blocking=stacked.is_cuda)
        self.arrival = torch.cuda.Event() if stacked.is_cuda else None
        if self.arrival:
            self.arrival.record(torch.cuda.current_stream(stacked.device))

    def read(self) -> list[float]:
        if self.arrival:
            self.arrival.synchronize()
        return self.numbers.tolist()
