"""What a training step costs: memory and arithmetic are counted, without running it, and time is measured.

All is in fp32.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from controlnet.ablations import start_as
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss, denoising_loss
from controlnet.training.memory import optimizer_size
from controlnet.training.options import TrainSettings
from controlnet.training.resolve import control_config
from controlnet.training.simulation import FakeRun, StorageCounter, bytes_of, zero_inputs
from ldm import StableDiffusion
from ldm.config import SD15, Config
from tools.acceptance.device import median_seconds
from tools.bench_case import name_of

from .experiment import Experiment
from .lab import BATCH, Lab
from .statistics import Verdict, table

BASE, CONTROL = "the base, fine-tuned as a whole", "a ControlNet"
DECODER = "the same, with gradients of the locked decoder's weights"
ENCODER = "the same, with those of the locked encoder, too"
STEPS = (BASE, CONTROL, DECODER, ENCODER)
MEMORY, NEAR = 0.23, 0.15  # the paper's, and how far off still agrees
AUTHORS = "SD 1.5 at 512x512, batches of 4"  # as in their tutorial
TIMED = 5


@dataclass(frozen=True)
class Cost:
    trained: int  # parameters
    memory: int  # bytes: weights, the optimizer's moments, gradients and activations
    operations: int  # of matrix products, convolutions and attention


class ThroughTheEncoder(ControlLoss):
    """The loss as it would be if the locked encoder kept its activations and got gradients."""

    def forward(self, z0: Tensor, noise: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        z_t = self.schedule.q_sample(z0, t, noise)
        output = self.unet(z_t, t, context, self.control(z_t, t, context, hint))
        return denoising_loss(self.schedule, output, z0, noise, t)


class BaseAlone(ControlLoss):
    def forward(self, z0: Tensor, noise: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        output = self.unet(self.schedule.q_sample(z0, t, noise), t, context)
        return denoising_loss(self.schedule, output, z0, noise, t)


def loss_of(step: str, sd: StableDiffusion, control: ControlNet, architecture: str = "full") -> ControlLoss:
    """The loss of a row of the table, where those weights require gradients that the row says."""
    control.requires_grad_(step != BASE)
    start_as(control, architecture)
    sd.unet.encoder.requires_grad_(step in (BASE, ENCODER))
    sd.unet.decoder.requires_grad_(step in (BASE, DECODER, ENCODER))
    make = {BASE: BaseAlone, ENCODER: ThroughTheEncoder}.get(step, ControlLoss)
    return make(sd.unet, control, sd.schedule)


def inputs(config: Config, batch: int) -> tuple[Tensor, ...]:
    return zero_inputs(config, (config.resolution, config.resolution), batch)


def trained_part(loss: ControlLoss, step: str) -> nn.Module:
    """What the optimizer changes. Gradients of other weights, where a row has them, are computed in vain."""
    return loss.unet if step == BASE else loss.control


def trained_in(part: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def counted(
    config: Config, batch: int, step: str = CONTROL, architecture: str = "full", optimizer: str = "adamw"
) -> Cost:
    """Counted with fake tensors, which have shapes but no contents. The weights of VAE and text encoder count, too."""
    settings = TrainSettings(architecture=architecture)
    # As on a GPU: operations of the kernels that take their place on a CPU are not counted.
    run = FakeRun(config, settings, control_config(settings), torch.device("cuda"))
    with run.fake:
        loss = loss_of(step, run.sd, run.loss.control, architecture)
        with StorageCounter() as counter:
            operations = count_flops(lambda: loss(*inputs(config, batch)).backward())
    part = trained_part(loss, step)
    weights = bytes_of(run.sd) if step == BASE else bytes_of(run.sd, run.loss.control)
    memory = weights + optimizer_size(part, optimizer) + counter.most
    return Cost(sum(parameter.numel() for parameter in trained_in(part)), memory, operations)


def count_flops(work: Callable) -> int:
    """The operations of matrix products, convolutions and attention, forward and backward."""
    aten = torch.ops.aten
    kernels = {  # those of CPUs, which PyTorch does not count
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda y, q, k, v, *_, **__: (
            sdpa_backward_flop_count(y, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        work()
    return counter.get_total_flops()


def seconds_of(lab: Lab, step: str = CONTROL, architecture: str = "full") -> float:
    """The median of a few steps, in fp32 with AdamW."""
    return median_seconds(step_of(lab, step, architecture), lab.device, TIMED)


def machine(lab: Lab) -> str:
    return f"{name_of(lab.device)}, {torch.get_num_threads()} threads"


def step_of(lab: Lab, step: str, architecture: str = "full") -> Callable[[], None]:
    """A function that takes a step of a new training."""
    sd = copy.deepcopy(lab.sd)
    sd.schedule = sd.schedule.to(lab.device)
    control = ControlNet.from_unet(sd.unet, control_config(TrainSettings(architecture=architecture)))
    loss = loss_of(step, sd, control, architecture)
    given = [tensor.to(lab.device) for tensor in inputs(sd.config, BATCH)]
    optimizer = torch.optim.AdamW(trained_in(trained_part(loss, step)), lr=1e-5, fused=True)

    def train() -> None:
        loss.zero_grad()
        loss(*given).backward()
        optimizer.step()

    return train


def measure(lab: Lab) -> dict:
    places = {
        f"{lab.sd.config.name}, batches of {BATCH}": (lab.sd.config, BATCH),
        AUTHORS: (SD15, 4),
        "SD 1.5 at 512x512, batches of 16": (SD15, 16),
    }
    costs = {
        place: {step: vars(counted(config, batch, step)) for step in STEPS} for place, (config, batch) in places.items()
    }
    return {"costs": costs, "seconds": {step: seconds_of(lab, step) for step in STEPS}, "device": machine(lab)}


def tables(numbers: dict) -> list[str]:
    def row(steps: dict, step: str) -> list[str]:
        units = {"memory": 1e9, "operations": 1e12}
        return [
            step,
            *(f"{steps[step][what] / unit:.3g} ({beside(steps, step, what):+.0%})" for what, unit in units.items()),
        ]

    head = ["memory in GB", "TFLOP"]
    counts = [
        table([f"a step with {place}", *head], [row(steps, step) for step in steps])
        for place, steps in numbers["costs"].items()
    ]
    times = numbers["seconds"]
    rows = [[step, f"{1000 * time:.0f} ({time / times[BASE] - 1:+.0%})"] for step, time in times.items()]
    return [*counts, table([f"a step with {next(iter(numbers['costs']))}", f"ms on {numbers['device']}"], rows)]


def beside(steps: dict, step: str, what: str) -> float:
    return steps[step][what] / steps[BASE][what] - 1


def verdict(numbers: dict) -> Verdict:
    steps = numbers["costs"][AUTHORS]
    memory, through = (beside(steps, step, "memory") for step in (CONTROL, ENCODER))
    words = (
        f"SD 1.5: {memory:+.0%} memory (the paper: {MEMORY:+.0%}), {through:+.0%} with gradients of all locked weights"
    )
    return Verdict(abs(memory - MEMORY) <= NEAR, words)


EXPERIMENT = Experiment(
    title="Cost (section 3.2)",
    claim="As the locked encoder needs no gradients, training a ControlNet takes only about 23% more memory and 34% "
    "more time in each iteration than training Stable Diffusion without it.",
    how="Memory, which is judged, is that of weights (of VAE and text encoder, too), gradients, AdamW's moments and "
    "activations, all fp32, counted with tensors that have shapes only. So is arithmetic, of which the time of SD 1.5 "
    "does not follow: it is shown, as is the time of the small base. Percentages are beside the first row. "
    "The paper does not say what was trained beside it; its code leaves the decoder's gradients on (third row). A "
    "fine-tuned base has gradients and moments of all its weights, a ControlNet's base has none.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
