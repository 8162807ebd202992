"""Where fake tensors of a CUDA device can be had."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def are_on_cuda() -> bool:
    """Not everywhere: PyTorch 2.9, built for CUDA, asks CUDA's driver for fake ones, too."""
    try:
        with FakeTensorMode():
            torch.empty(1).to("cuda")
    except RuntimeError:
        return False
    return True


needs_fake_cuda = pytest.mark.skipif(not are_on_cuda(), reason="this PyTorch has no fake CUDA without CUDA's driver")
