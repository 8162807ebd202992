"""Which device to compute on, and in which precision."""

import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None is the first CUDA device if there is one, else the CPU.

    Raises ValueError for a name that is none, or a device that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'the device is "{name}", expected cpu, cuda, cuda:1 ... or mps') from error
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        there = ", ".join(f"{kind} ({count})" for kind, count in available.items() if count)
        raise ValueError(f'there is no device "{name}" for this PyTorch, only {there}: take one of these')
    return device
