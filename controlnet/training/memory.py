"""How much memory a training run will need, found without it: the model runs on fake tensors, which have shapes and
dtypes but no contents, while every storage that comes and goes is counted.

What is counted is what PyTorch's allocator hands out. The workspaces of cuDNN, the CUDA context (some 0.5 GB) and
fragmentation come on top. The optimiser's moments are there from the first step's end on, so they are counted always.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlnet.common.devices import PRECISIONS
from controlnet.common.images import Size
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss, only_middle
from ldm.config import Config, ControlConfig
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import set_checkpointing

from .muon import Muon


@dataclass(frozen=True)
class Plan:
    """The settings of train.py that memory depends on, by the names of its flags."""

    size: Size
    batch_size: int = 1
    precision: str = "fp32"
    checkpointing: bool = False
    cached: bool = True
    hint_channels: int = 3
    sd_unlocked: bool = False
    only_mid_control: bool = False
    optimizer: str = "adamw"
    ema: bool = False
    lite: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, item by item, when most is held in all."""

    base: int  # the locked UNet, with an unlocked decoder
    encoders: int  # autoencoder and text encoder: none with cached latents, which let them leave the device
    copy: int  # the trained ControlNet, in fp32, and its moving average
    gradients: int
    optimiser: int  # the moments of each trained parameter
    activations: int  # what the fullest moment of a step holds beyond that, with everything short-lived
    encoding: int  # the peak of encoding a batch, which comes before and is over then
    trained: int  # parameters, a number and not bytes

    @property
    def peak(self) -> int:
        lasting = self.base + self.encoders + self.copy + self.optimiser
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


def predict(config: Config, plan: Plan) -> Memory:
    """For one process. Nothing of the model's size is allocated, and no weights are needed."""
    with torch.device("meta"):
        sd = StableDiffusion(config).to(PRECISIONS[plan.precision]).requires_grad_(False)
        control = ControlNet.from_unet(
            sd.unet, ControlConfig(plan.hint_channels, architecture="lite" if plan.lite else "full")
        )
    if plan.only_mid_control:
        only_middle(control)
    if plan.sd_unlocked:
        sd.unet.decoder.float().requires_grad_(True)
    set_checkpointing(sd.unet, plan.checkpointing)
    set_checkpointing(control, plan.checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the schedule's tables are real
        make_fake(sd)
        make_fake(control)
        loss = ControlLoss(sd.unet, control, sd.schedule)
        trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained)
        step = step_peak(sd, loss, plan)
        return Memory(
            base=size_of(sd.unet),
            encoders=0 if plan.cached else size_of(sd.vae) + size_of(sd.text_encoder),
            copy=size_of(control) * (2 if plan.ema else 1),
            gradients=gradients,
            optimiser=optimiser_size(loss, plan.optimizer),
            activations=max(step - gradients, 0),
            encoding=0 if plan.cached else encoding_peak(sd, plan),
            trained=sum(parameter.numel() for parameter in trained),
        )


def optimiser_size(module: nn.Module, optimizer: str) -> int:
    """Bytes for the moments of what is trained: AdamW has two, in 8 bits a quarter of that, and Muon one for what it
    takes in AdamW's place."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    two = 2 * sum(parameter.nbytes for _, parameter in named)
    if optimizer == "muon":
        return two - sum(parameter.nbytes for parameter in Muon(named, lr=1.0).inner)
    return two // 4 if optimizer == "adamw8bit" else two


def make_fake(module: nn.Module) -> None:
    """The parameters of a module on the meta device become fake tensors of the mode that is on."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(fake, parameter.requires_grad))


def size_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def step_peak(sd: StableDiffusion, loss: ControlLoss, plan: Plan) -> int:
    """The most bytes that one forward and backward pass holds, with its gradients and its inputs."""
    b, (height, width), dtype = plan.batch_size, plan.size, PRECISIONS[plan.precision]
    factor, config = sd.config.vae.downscale, sd.config
    with StorageCounter() as counter:
        z0 = torch.zeros(b, config.unet.latent_channels, height // factor, width // factor)
        context = torch.zeros(b, config.text.positions, config.unet.context_width, dtype=dtype)
        hint = torch.zeros(b, plan.hint_channels, height, width)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(z0, torch.zeros_like(z0), torch.zeros(b, dtype=torch.int64), context, hint)
        value.backward()
    return counter.most


@torch.no_grad()
def encoding_peak(sd: StableDiffusion, plan: Plan) -> int:
    with StorageCounter() as counter:
        sd.vae.posterior(torch.zeros(plan.batch_size, 3, *plan.size, dtype=PRECISIONS[plan.precision]))
    return counter.most


def table(memory: Memory) -> str:
    """A line for each item, in GB (10^9 bytes)."""
    items = {
        "locked base": memory.base,
        "autoencoder, text encoder": memory.encoders,
        "trained copy": memory.copy,
        "optimiser": memory.optimiser,
        "gradients": memory.gradients,
        "activations": memory.activations,
    }
    lines = [f"    {name:<26}{size / 1e9:7.2f} GB" for name, size in items.items()]
    return "\n".join([*lines, f"    {'at most, all together':<26}{memory.peak / 1e9:7.2f} GB"])
