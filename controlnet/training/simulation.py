"""A step of training without its numbers: fake tensors have shapes and dtypes but no contents, and every storage that
comes and goes is counted. So what a step holds at its peak is known in seconds, on any machine.

What PyTorch's operators return is counted; what they allocate and free within themselves is not.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from controlnet.ablations import only_middle, start_as
from controlnet.common.devices import PRECISIONS
from controlnet.common.images import Size
from controlnet.config import ControlConfig
from controlnet.inference.sizes import latent_shape
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from ldm.config import Config
from ldm.fast.onednn import use_onednn_linear
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import set_checkpointing

from .options import TrainSettings


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages made within `with`: `now`, and in its `history` whenever one was made."""

    def __init__(self):
        super().__init__()
        self.now, self.history = 0, [0]
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):
            self.known.add(storage)  # was there before, like the weights: a view of it takes no memory
        output = func(*args, **(kwargs or {}))
        for storage in storages(output):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.history.append(self.now)
                weakref.finalize(storage, self.forget, storage.nbytes())
        return output

    def forget(self, size: int) -> None:
        self.now -= size

    @property
    def most(self) -> int:
        return max(self.history)


def storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# What CUDA's autocast computes in fp32 and a CPU's does not, of the functions in the networks (`AT_FORALL_FP32` in
# PyTorch's autocast_mode.h): norms, and maps that are enlarged.
IN_FP32_ON_CUDA = ("group_norm", "layer_norm", "interpolate")


@contextmanager
def casts_of(device: torch.device) -> Iterator[None]:
    """Inside, autocast on a CPU casts as that of the device does."""
    functions = {name: getattr(F, name) for name in IN_FP32_ON_CUDA if device.type == "cuda"}
    for name, function in functions.items():
        setattr(F, name, in_fp32_under_autocast(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(F, name, function)


def in_fp32_under_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def cast(*args, **kwargs) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    return cast


class FakeRun:
    """The networks of a run, as `train.py` prepares them, as fake tensors on a CPU that stand for those on `device`:
    fake CUDA tensors have no backward pass where PyTorch was built without CUDA."""

    def __init__(self, config: Config, settings: TrainSettings, control_config: ControlConfig, device: torch.device):
        self.settings, self.dtype = settings, PRECISIONS[settings.precision]
        with torch.device("meta"):
            self.sd = StableDiffusion(config).to(self.dtype).requires_grad_(False)
            control = ControlNet.from_unet(self.sd.unet, control_config)
        start_as(control, settings.architecture)
        if settings.only_mid_control:
            only_middle(control)
        if settings.sd_unlocked:
            self.sd.unet.decoder.float().requires_grad_(True)
        for network in (self.sd.unet, control):
            set_checkpointing(network, settings.checkpointing)
        if (device.type, self.dtype) == ("cpu", torch.float32):
            use_onednn_linear(self.sd.unet.decoder, control)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)  # the schedule's tables are real
        self.device = device
        with self.fake:
            make_fake(self.sd)
            make_fake(control)
        self.loss = ControlLoss(self.sd.unet, control, self.sd.schedule)
        self.trained = [parameter for parameter in self.loss.parameters() if parameter.requires_grad]
        self.gradients = sum(parameter.nbytes for parameter in self.trained)

    def inputs(self, size: Size, batch_size: int) -> tuple[Tensor, ...]:
        return zero_inputs(self.sd.config, size, batch_size, self.dtype, self.loss.control.config.hint_channels)

    def inputs_size(self, size: Size) -> int:
        """Bytes, for one image."""
        with self.fake:
            return sum(tensor.nbytes for tensor in self.inputs(size, 1))

    def step(self, size: Size, batch_size: int, gradients_last: bool) -> list[int]:
        """The bytes that one forward and backward pass holds, from one new tensor to the next: its inputs, activations
        and gradients.

        With `gradients_last` the gradients of earlier batches are there all along, and count; what this batch adds to
        them is made beside them.
        """
        with self.fake:
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter) if gradients_last else None
        kept = self.gradients if gradients_last else 0
        with self.fake, casts_of(self.device), StorageCounter() as counter:
            inputs = self.inputs(size, batch_size)
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                value = self.loss(*inputs)
            value.backward()
        return [kept + now for now in counter.history]

    def encoding(self, size: Size, batch_size: int) -> list[int]:
        """Like `step`, of encoding the images of a batch; captions take next to nothing."""
        return self.without_gradients(self.sd.vae.posterior, (batch_size, 3, *size))

    def decoding(self, size: Size) -> list[int]:
        """Like `step`, of decoding one image of a grid."""
        return self.without_gradients(self.sd.vae.decode, (1, *latent_shape(self.sd.config, size)))

    @torch.no_grad()
    def without_gradients(self, function: Callable[[Tensor], object], shape: tuple[int, ...]) -> list[int]:
        with self.fake, StorageCounter() as counter:
            function(torch.zeros(shape, dtype=self.dtype))
        return counter.history


def zero_inputs(
    config: Config, size: Size, batch_size: int, dtype: torch.dtype = torch.float32, hint_channels: int = 3
) -> tuple[Tensor, ...]:
    """z0, noise, t, context, which is of `dtype`, and hint: what `ControlLoss` gets."""
    z0 = torch.zeros(batch_size, *latent_shape(config, size))
    context = torch.zeros(batch_size, config.text.positions, config.unet.context_width, dtype=dtype)
    hint = torch.zeros(batch_size, hint_channels, *size)
    return z0, torch.zeros_like(z0), torch.zeros(batch_size, dtype=torch.int64), context, hint


def make_fake(module: nn.Module) -> None:
    """The parameters of a module on the meta device become fake tensors of the mode that is on."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(fake, parameter.requires_grad))


def bytes_of(*modules: nn.Module) -> int:
    """Of their parameters."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
