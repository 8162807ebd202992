"""Several processes that train one model, started by `torchrun --nproc_per_node=N train.py ...`: each computes its part
of every step, and the gradients are averaged. In a single process everything here does nothing.

Several machines (`--nnodes`) may have a disk each: what the main process reads is sent to the others, and a cache is
built once on each disk.
"""

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from controlnet.common.devices import pick_device, use_device

T = TypeVar("T")


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

    def from_main(self, make: Callable[[], T]) -> T:
        """Gives all processes what `make` returns in the main one; tensors, on the CPU, travel one by one.

        If it raises, all end, and the main process says why.
        """
        if self.world_size == 1:
            return make()
        made, outline = None, [None]
        try:
            if self.is_main:
                made = make()
                outline = [(tree_map_only(Tensor, lambda tensor: tensor.to("meta"), made),)]
        finally:
            dist.broadcast_object_list(outline, device=torch.device("cpu"))
        if outline[0] is None:
            raise SystemExit(2)
        made = made if self.is_main else outline[0][0]
        return tree_map_only(Tensor, self._received, made)

    def _received(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.is_main else torch.empty_like(tensor, device="cpu")
        dist.broadcast(tensor, src=0)
        return tensor

    def sharing(self, folder: Path) -> list[int]:
        """The processes that see the same `folder` as this one: all, or those of a machine with its own disk."""
        if self.world_size == 1:
            return [0]
        mark = self.from_main(lambda: uuid4().hex)
        folder.mkdir(parents=True, exist_ok=True)
        marks = [folder / f".{mark}.{rank}" for rank in range(self.world_size)]
        marks[self.rank].touch()
        self.barrier()
        seen = [rank for rank, path in enumerate(marks) if path.exists()]
        self.barrier()
        marks[self.rank].unlink()
        return seen

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
            init_sync=False,
            gradient_as_bucket_view=True,  # otherwise the gradients would be in memory twice
        )

    def accumulating(self, loss: nn.Module, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of each accumulated batch: only the last one averages the gradients."""
        return nullcontext() if self.world_size == 1 or last else loss.no_sync()

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def join_processes(device: str | None) -> Process:
    """This process among those that torchrun has started; without it, alone. Each takes a CUDA device of its own.

    Raises ValueError for a device that is not there.
    """
    if launched_processes() == 1:
        return Process(0, 1, use_device(device))
    picked = pick_device(device)
    if picked.type == "cuda":
        picked = use_device(f"cuda:{os.environ['LOCAL_RANK']}")
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
    # The main process may compute latents, or wait for another run's, while the others wait for it.
    patience = timedelta(days=1)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
    # Processes that are started again must not find the addresses of those before.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    return Process(dist.get_rank(), world_size, picked)


def launched_processes() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch() -> str | None:
    """A name for this call of torchrun, the same for all processes that it starts again (--max-restarts); without it
    None."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']}, by process {os.getppid()} on {platform.node()}"


def started_again() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
