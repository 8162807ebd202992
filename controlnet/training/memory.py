"""How much memory a training run will need, found without it: one step runs on fake tensors, which have shapes and
dtypes but no contents, while every storage that comes and goes is counted.

What is counted is what PyTorch's allocator hands out. The workspaces of cuDNN, the CUDA context (some 0.5 GB) and
fragmentation come on top. The optimizer's moments exist from the end of the first step on, so they always count.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlnet.ablations import only_middle
from controlnet.common.devices import PRECISIONS
from controlnet.common.images import Size
from controlnet.config import ControlConfig
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import set_checkpointing

from .muon import Muon
from .options import TrainSettings


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, item by item, when most is held in all."""

    base: int  # the locked UNet, with an unlocked decoder
    encoders: int  # autoencoder and text encoder: none with cached latents, which let them leave the device
    copy: int  # the trained ControlNet, in fp32, and its moving average
    gradients: int
    optimizer: int  # the moments of each trained parameter
    activations: int  # peak activations and temporaries of a step
    encoding: int  # the peak of encoding a batch, which comes before and is over then
    trained: int  # parameters, a number and not bytes

    @property
    def peak(self) -> int:
        lasting = self.base + self.encoders + self.copy + self.optimizer
        return lasting + max(self.gradients + self.activations, self.encoding)


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages made within `with`, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):
            self.known.add(storage)  # was there before, like the weights: a view of it takes no memory
        output = func(*args, **(kwargs or {}))
        for storage in storages(output):
            if storage not in self.known:
                self.count(storage)
        return output

    def count(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, size: int) -> None:
        self.now -= size


def storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def predict(config: Config, settings: TrainSettings, size: Size, control_config: ControlConfig) -> Memory:
    """For one process. Nothing of the model's size is allocated, and no weights are needed."""
    with torch.device("meta"):
        sd = StableDiffusion(config).to(PRECISIONS[settings.precision]).requires_grad_(False)
        control = ControlNet.from_unet(sd.unet, control_config)
    if settings.only_mid_control:
        only_middle(control)
    if settings.sd_unlocked:
        sd.unet.decoder.float().requires_grad_(True)
    set_checkpointing(sd.unet, settings.checkpointing)
    set_checkpointing(control, settings.checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the schedule's tables are real
        make_fake(sd)
        make_fake(control)
        loss = ControlLoss(sd.unet, control, sd.schedule)
        trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained)
        step = step_peak(sd, loss, settings, size)
        return Memory(
            base=size_of(sd.unet),
            encoders=size_of(sd.vae) + size_of(sd.text_encoder) if settings.no_cache else 0,
            copy=size_of(control) * (2 if settings.ema else 1),
            gradients=gradients,
            optimizer=optimizer_size(loss, settings.optimizer),
            activations=max(step - gradients, 0),
            encoding=encoding_peak(sd, settings, size) if settings.no_cache else 0,
            trained=sum(parameter.numel() for parameter in trained),
        )


def optimizer_size(module: nn.Module, optimizer: str) -> int:
    """Bytes for the moments of what is trained: AdamW has two, in 8 bits a quarter of that, and Muon one for what it
    takes in AdamW's place."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    two = 2 * sum(parameter.nbytes for _, parameter in named)
    if optimizer == "muon":
        return two - sum(parameter.nbytes for parameter in Muon(named, lr=1.0).hidden)
    return two // 4 if optimizer == "adamw8bit" else two


def make_fake(module: nn.Module) -> None:
    """The parameters of a module on the meta device become fake tensors of the mode that is on."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(fake, parameter.requires_grad))


def size_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def step_peak(sd: StableDiffusion, loss: ControlLoss, settings: TrainSettings, size: Size) -> int:
    """The most bytes that one forward and backward pass holds, with its gradients and its inputs."""
    b, (height, width), dtype = settings.batch_size, size, PRECISIONS[settings.precision]
    factor, config = sd.config.vae.downscale, sd.config
    with StorageCounter() as counter:
        z0 = torch.zeros(b, config.unet.latent_channels, height // factor, width // factor)
        context = torch.zeros(b, config.text.positions, config.unet.context_width, dtype=dtype)
        hint = torch.zeros(b, loss.control.config.hint_channels, height, width)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(z0, torch.zeros_like(z0), torch.zeros(b, dtype=torch.int64), context, hint)
        value.backward()
    return counter.most


@torch.no_grad()
def encoding_peak(sd: StableDiffusion, settings: TrainSettings, size: Size) -> int:
    with StorageCounter() as counter:
        sd.vae.posterior(torch.zeros(settings.batch_size, 3, *size, dtype=PRECISIONS[settings.precision]))
    return counter.most


def table(memory: Memory) -> str:
    """A line for each item, in GB (10^9 bytes)."""
    items = {
        "locked base": memory.base,
        "autoencoder, text encoder": memory.encoders,
        "trained copy": memory.copy,
        "optimizer": memory.optimizer,
        "gradients": memory.gradients,
        "activations": memory.activations,
    }
    lines = [f"    {name:<26}{size / 1e9:7.2f} GB" for name, size in items.items()]
    return "\n".join([*lines, f"    {'at most, all together':<26}{memory.peak / 1e9:7.2f} GB"])
