"""Several processes that train one model, started by `torchrun --nproc_per_node=N train.py ...`: each computes its part
of every step, and the gradients are averaged. In a single process everything here does nothing."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from controlnet.common.devices import pick_device


@dataclass(frozen=True)
class Process:
    """This process, `rank` of `world_size`. The main one, rank 0, writes and talks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def mean(self, scalar: Tensor) -> Tensor:
        """Over all processes, of a scalar on the device."""
        if self.world_size > 1:
            dist.all_reduce(scalar)
        return scalar / self.world_size

    def any(self, *values: bool) -> list[bool]:
        """The same answers everywhere: a signal reaches the processes at different steps, and all must stop at one."""
        if self.world_size == 1:
            return list(values)
        votes = torch.tensor(values, dtype=torch.int32)  # on the CPU: no GPU is waited for
        dist.all_reduce(votes)
        return (votes > 0).tolist()

    def wrap_ddp(self, loss: nn.Module) -> nn.Module:
        """The module whose backward pass averages the gradients: call the wrapper, never the inner module."""
        if self.world_size == 1:
            return loss
        for parameter in loss.parameters():
            if parameter.requires_grad:  # the locked rest was read from the same file
                dist.broadcast(parameter.data, src=0)
        return DistributedDataParallel(
            loss,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,  # else the gradients stand in memory twice
        )

    def accumulating(self, loss: nn.Module, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of each accumulated batch: only the last one averages the gradients."""
        return nullcontext() if self.world_size == 1 or last else loss.no_sync()

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def join_processes(device: str | None) -> Process:
    """By the variables that torchrun sets; without them a process is alone. Each takes a CUDA device of its own.

    Raises ValueError for a device that is not there.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Process(0, 1, pick_device(device))
    picked = pick_device(device)
    if picked.type == "cuda":
        picked = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(picked)
    # The main process may compute latents, or wait for another run's, while the others wait for it.
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return Process(dist.get_rank(), world_size, picked)
