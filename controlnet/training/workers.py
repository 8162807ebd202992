"""The processes that read data for the training process: how they start, and what is said of their errors and their
end."""

import os
import re
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

CUDA_WORKERS = 4


def count_of(asked: int | None, device: torch.device) -> int:
    """How many: as asked for or, so that a GPU need not wait, a few for CUDA and none for a CPU."""
    if asked is not None:
        return asked
    return CUDA_WORKERS if device.type == "cuda" else 0


def reading(loader: DataLoader) -> Iterator:
    """The loader's batches. Errors in its workers are raised without PyTorch's words around them, and the sudden end of
    a worker is a ValueError."""
    try:
        yield from loader
    except (ValueError, OSError, EOFError) as error:
        text = str(error)
        if text.startswith("Caught "):  # in a worker: PyTorch's words, a traceback, and last what was raised
            *_, said = re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", text, flags=re.MULTILINE)
            raise (OSError if isinstance(error, OSError) else ValueError)(said.strip()) from error
        if loader.num_workers and not isinstance(error, ValueError):
            raise ValueError(worker_ended(error)) from error
        raise


def worker_ended(error: Exception) -> str:
    reason = str(error).split(". ")[0].rstrip(".") or type(error).__name__
    return (
        f"a process that reads data has ended ({reason}), perhaps for lack of memory: go on with --resume and fewer "
        "--workers, or 0"
    )


def start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()  # Ctrl-C goes to a whole process group, but only the training process is to handle it
