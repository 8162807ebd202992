"""How much memory a training run will need, found without running it.

What the networks and the optimizer keep follows from their parameters, what comes and goes from a simulated step
(simulation.py). What is neither is estimated from measurements, on CUDA as a range. Not in it: torch.compile, and the
workers that read data.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from controlnet.common.images import Size
from controlnet.config import ControlConfig
from ldm.config import Config

from .latent_cache import SHARD, encoding_batch
from .muon import is_hidden_weight
from .options import TrainSettings
from .simulation import FakeRun, bytes_of

LARGEST_BATCH = 4096  # beyond it no answer is looked for


Estimates = dict[str, tuple[int, int]]  # bytes that no simulation sees, by name: at least and at most


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, item by item, at the run's peak."""

    base: int  # the locked UNet, with an unlocked decoder
    encoders: int  # autoencoder and text encoder, as far as they are there during the steps
    copy: int  # the trained ControlNet, in fp32, and its moving average
    optimizer: int  # the moments of each trained parameter, or this process's share of them
    snapshot: int  # on a CPU: what a save has copied and writes while the training goes on
    validation: int  # the inputs of the validation loss
    gradients: int
    activations: int  # what a step holds beside them at its peak
    images: int  # the peak while images are encoded or decoded, when there are no activations
    estimates: Estimates
    trained: int  # parameters, a number and not bytes

    @property
    def counted(self) -> int:
        lasting = self.base + self.encoders + self.copy + self.optimizer + self.snapshot + self.validation
        return lasting + max(self.gradients + self.activations, self.images)

    @property
    def least(self) -> int:
        return self.counted + sum(least for least, _ in self.estimates.values())

    @property
    def most(self) -> int:
        return self.counted + sum(most for _, most in self.estimates.values())


class Prediction:
    """batch size -> `Memory`, for one process of a run. Nothing of the model's size is allocated, and no weights are
    needed.

    `world_size` is the number of processes, `validation` that of validation pairs.
    """

    def __init__(
        self,
        config: Config,
        settings: TrainSettings,
        size: Size,
        control_config: ControlConfig,
        device: torch.device,
        world_size: int = 1,
        validation: int = 0,
    ):
        self.settings, self.size, self.device = settings, size, device
        self.world_size, self.validation = world_size, validation
        self.run = FakeRun(config, settings, control_config, device)
        self.buckets_last = world_size > 1  # DistributedDataParallel's, in which the gradients lie
        # With accumulated batches gradients live through the next forward pass. On a CPU they might as well: what they
        # leave in the heap is in pieces, and most activations come to lie elsewhere.
        self.gradients_last = self.buckets_last or settings.accumulate > 1 or device.type == "cpu"
        self.decoding = max(self.run.decoding(size)) if settings.sample_count or settings.validate else 0

    def __call__(self, batch_size: int) -> Memory:
        """Simulated at this batch size."""
        return self.memory(max(self.step(batch_size)), max(self.encoding(self.encoded_at_once(batch_size))))

    def largest_batch(self, limit: float) -> tuple[int, Memory]:
        """The largest batch size that needs no more than `limit` bytes, and what it needs; if there is none, 0 and what
        a batch of 1 needs."""
        step, encoding = peak_by_batch(self.step), peak_by_batch(self.encoding)

        def memory(batch_size: int) -> Memory:
            return self.memory(step(batch_size), encoding(self.encoded_at_once(batch_size)))

        fitting = bisect_right(range(1, LARGEST_BATCH + 1), limit, key=lambda batch_size: memory(batch_size).most)
        return fitting, memory(max(fitting, 1))

    def step(self, batch_size: int) -> list[int]:
        return self.run.step(self.size, batch_size, self.gradients_last)

    def encoding(self, images: int) -> list[int]:
        return self.run.encoding(self.size, images)

    def encoded_at_once(self, batch_size: int) -> int:
        """How many images: the cache has batches of its own, the validation those of the training."""
        cached = min(encoding_batch(self.size), self.settings.images or SHARD)
        return max(batch_size if self.settings.no_cache else cached, min(batch_size, self.validation))

    def memory(self, step: int, encoding: int) -> Memory:
        """The prediction, given the peaks of a step, with its gradients, and of encoding a batch."""
        run, settings = self.run, self.settings
        encoders, for_images = self.encoders()
        copy = bytes_of(run.loss.control) * (2 if settings.ema else 1)
        moments = optimizer_size(run.loss, settings.optimizer)
        optimizer = moments // (self.world_size if settings.shard else 1)
        snapshot = self.snapshot(copy, moments, optimizer)
        not_yet = 0 if settings.no_cache else optimizer + snapshot  # when images are encoded, which is before the steps
        memory = Memory(
            base=bytes_of(run.sd.unet),
            encoders=encoders,
            copy=copy,
            optimizer=optimizer,
            snapshot=snapshot,
            validation=self.validation * run.inputs_size(self.size),
            gradients=run.gradients,
            activations=max(step - run.gradients, 0),
            images=for_images + max(encoding - not_yet, self.decoding) + (run.gradients if self.buckets_last else 0),
            estimates={},
            trained=sum(parameter.numel() for parameter in run.trained),
        )
        return replace(memory, estimates=estimates(memory, run))

    def snapshot(self, copy: int, moments: int, own_moments: int) -> int:
        """Bytes that the main process copies for a save: all that is trained, its average and its moments. Those of
        other processes, which it gathers for that, stay with it, too. From a GPU all goes to the CPU's memory."""
        if self.device.type != "cpu":
            return 0
        decoder = bytes_of(self.run.sd.unet.decoder) if self.settings.sd_unlocked else 0
        return copy + decoder + moments + (moments - own_moments)

    def encoders(self) -> tuple[int, int]:
        """Bytes of autoencoder and text encoder during the steps, and what comes on top while images are encoded for
        the cache or decoded for the grids. On a CPU they never leave, and encoding packs copies of them (prepare.py).
        """
        sd, cached = self.run.sd, not self.settings.no_cache
        plain = bytes_of(sd.vae, sd.text_encoder)
        if self.device.type != "cpu":
            return (0, plain) if cached else (plain, 0)
        packed = bytes_of(sd.vae.encoder, sd.text_encoder) if self.run.dtype == torch.float32 else 0
        return (plain, packed) if cached else (plain + packed, 0)


def peak_by_batch(trace: Callable[[int], list[int]]) -> Callable[[int], int]:
    """batch size -> the most bytes of a trace, from two traces: whatever is held at some point grows linearly with the
    batch. (Not from a batch of 1, whose tensors need fewer copies: axes of length 1 are contiguous in any order.)"""
    twos, threes = trace(2), trace(3)
    return lambda n: max(two + (n - 2) * (three - two) for two, three in zip(twos, threes, strict=True))


def optimizer_size(module: nn.Module, optimizer: str) -> int:
    """Bytes for the moments of what is trained: AdamW has two, in 8 bits a quarter of that, and Muon one for hidden
    weights, two for the others."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    two = 2 * sum(parameter.nbytes for _, parameter in named)
    if optimizer == "muon":
        return two - sum(parameter.nbytes for name, parameter in named if is_hidden_weight(name, parameter))
    return two // 4 if optimizer == "adamw8bit" else two


# ----------------------------------------------------------------------------------------------------------- estimates


def estimates(memory: Memory, run: FakeRun) -> Estimates:
    """What comes on top of what is counted, by name. The optimizer, the scaler of the loss and the moving average add
    nothing: they work in place, and Muon's products come when there are no activations."""
    if run.device.type == "cuda":
        return cuda_estimates(memory)
    return cpu_estimates(memory, run) if run.device.type == "cpu" else {}


def cuda_estimates(memory: Memory) -> Estimates:
    """As measured on one H200 (PyTorch 2.11; SD 1.5 in fp16 at 512x512, batches of 1 to 16, with and without
    checkpointing and accumulation): 0.56 to 1.13 GB were allocated that are not counted, and 1 to 12 % of what was
    allocated was reserved on top, in blocks that do not fit what comes next. The context was not measured: its usual
    size."""
    least, most = int(0.56e9), int(1.13e9)
    return {
        "CUDA context": (int(0.5e9), int(0.6e9)),
        "workspaces of cuDNN, cuBLAS": (least, most),
        "reserved, not used": (int(0.01 * (memory.counted + least)), int(0.12 * (memory.counted + most))),
    }


def cpu_estimates(memory: Memory, run: FakeRun) -> Estimates:
    """As measured on Linux: what Python and PyTorch take before a network is there; oneDNN's copy of a convolution's
    weight in its own layout, of a gradient two; and what glibc's heap loses between the blocks of gradients, which come
    and go with each step, a quarter of them. While a save writes the weights' file, it holds kernels in another
    layout."""
    kernels = [parameter for parameter in run.loss.parameters() if parameter.ndim == 4]
    workspace = max(parameter.nbytes * (2 if parameter.requires_grad else 1) for parameter in kernels)
    saved = run.sd.unet if run.settings.sd_unlocked else run.loss.control
    laid_out = sum(p.nbytes for p in saved.parameters() if p.ndim == 4 and p.shape[-1] > 1)
    return {
        "Python and PyTorch": (int(0.55e9), int(0.55e9)),
        "workspaces of oneDNN": (workspace, workspace),
        "holes in the heap": (memory.gradients // 4, memory.gradients // 4),
        "kernels for a file": (0, laid_out),
    }


# ------------------------------------------------------------------------------------------------------------ the table


def table(memory: Memory) -> str:
    """A line for each item, in GB (10^9 bytes)."""
    peak = {"gradients": memory.gradients, "activations": memory.activations}
    if memory.images > sum(peak.values()):
        peak = {"encoding or decoding images": memory.images}
    items = {
        "locked base": memory.base,
        "autoencoder, text encoder": memory.encoders,
        "trained copy": memory.copy,
        "optimizer": memory.optimizer,
        **({"copy for a save": memory.snapshot} if memory.snapshot else {}),
        "validation": memory.validation,
        **peak,
    }
    lines = [f"    {name:<28}{size / 1e9:7.2f} GB" for name, size in items.items()]
    lines += [f"    {name:<28}{span(*bounds)}" for name, bounds in memory.estimates.items()]
    return "\n".join([*lines, f"    {'at most, all together':<28}{span(memory.least, memory.most)}"])


def span(least: int, most: int) -> str:
    return f"{least / 1e9:7.2f} GB" if least == most else f"{least / 1e9:7.2f} to {most / 1e9:.2f} GB (estimated)"
