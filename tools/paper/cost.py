"""What a training step costs: memory and arithmetic are counted, without running it, and time is measured."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from controlnet.ablations import start_as
from controlnet.config import ControlConfig
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss, denoising_loss
from controlnet.training.options import TrainSettings
from controlnet.training.resolve import control_config
from controlnet.training.simulation import FakeTensorMode, StorageCounter, make_fake, size_of
from ldm import StableDiffusion
from ldm.config import SD15, Config
from tools.acceptance.device import seconds
from tools.bench_case import count_flops

from .experiment import Experiment
from .lab import BATCH, Lab
from .statistics import Verdict, table

BASE, CONTROL = "the base, fine-tuned as a whole", "a ControlNet"
DECODER = "the same, with gradients of the locked decoder's weights"
ENCODER = "the same, with those of the locked encoder, too"
STEPS = (BASE, CONTROL, DECODER, ENCODER)
MEMORY, TIME, NEAR = 0.23, 0.34, 0.15  # the paper's, and how far off still agrees
AUTHORS = "SD 1.5 at 512x512, batches of 4"  # as in their tutorial
MOMENTS = 2  # that AdamW keeps, in fp32 as everything here
TIMED = 5


@dataclass(frozen=True)
class Cost:
    trained: int  # parameters
    memory: int  # bytes: weights, AdamW's moments, gradients and activations
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
    """With gradients for what they are computed of."""
    control.requires_grad_(step != BASE)
    start_as(control, architecture)
    sd.unet.encoder.requires_grad_(step in (BASE, ENCODER))
    sd.unet.decoder.requires_grad_(step in (BASE, DECODER, ENCODER))
    make = {BASE: BaseAlone, ENCODER: ThroughTheEncoder}.get(step, ControlLoss)
    return make(sd.unet, control, sd.schedule)


def inputs(config: Config, batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """z0, noise, t, context and hint, all zero."""
    side = config.resolution // config.vae.downscale
    z0 = torch.zeros(batch, config.unet.latent_channels, side, side, device=device)
    context = torch.zeros(batch, config.text.positions, config.unet.context_width, device=device)
    hint = torch.zeros(batch, 3, config.resolution, config.resolution, device=device)
    return z0, torch.zeros_like(z0), torch.zeros(batch, dtype=torch.int64, device=device), context, hint


def counted(config: Config, batch: int, step: str = CONTROL, architecture: str = "full") -> Cost:
    """Of fake tensors, which have shapes but no contents."""
    settings = TrainSettings(architecture=architecture)
    with torch.device("meta"):
        sd = StableDiffusion(config).requires_grad_(False)
        control = ControlNet.from_unet(sd.unet, control_config(settings))
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # the schedule's tables are real
    with fake:
        make_fake(sd.unet)
        make_fake(control)
        loss = loss_of(step, sd, control, architecture)
        with StorageCounter() as counter:
            operations = count_flops(lambda: loss(*inputs(config, batch)).backward())
    weights = (sd.unet,) if step == BASE else (sd.unet, control)
    trained = [p for p in weights[-1].parameters() if p.requires_grad]
    kept = size_of(*weights) + MOMENTS * sum(parameter.nbytes for parameter in trained)
    return Cost(sum(parameter.numel() for parameter in trained), kept + counter.most, operations)


def training_costs(lab: Lab, architecture: str) -> dict[str, int]:
    return vars(counted(lab.sd.config, BATCH, architecture=architecture))


def time_steps(lab: Lab) -> dict[str, float]:
    """Seconds: the medians of a few steps, in turn."""
    steps: dict[str, Callable] = {}
    for name in STEPS:
        sd = copy.deepcopy(lab.sd)
        sd.schedule = sd.schedule.to(lab.device)
        loss = loss_of(name, sd, ControlNet.from_unet(sd.unet, ControlConfig()))
        given = inputs(sd.config, BATCH, lab.device)
        steps[name] = lambda loss=loss, given=given: loss(*given).backward()
    times = {name: [] for name in STEPS}
    for _ in range(1 + TIMED):
        for name, step in steps.items():
            times[name].append(seconds(step, lab.device))
    return {name: median(taken[1:]) for name, taken in times.items()}


def measure(lab: Lab) -> dict:
    places = {
        f"{lab.sd.config.name}, batches of {BATCH}": (lab.sd.config, BATCH),
        AUTHORS: (SD15, 4),
        "SD 1.5 at 512x512, batches of 16": (SD15, 16),
    }
    costs = {
        place: {step: vars(counted(config, batch, step)) for step in STEPS} for place, (config, batch) in places.items()
    }
    return {"costs": costs, "seconds": time_steps(lab)}


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
    return [*counts, table([f"a step with {next(iter(numbers['costs']))}", "ms, measured"], rows)]


def beside(steps: dict, step: str, what: str) -> float:
    return steps[step][what] / steps[BASE][what] - 1


def verdict(numbers: dict) -> Verdict:
    steps = numbers["costs"][AUTHORS]
    memory, operations = (beside(steps, CONTROL, what) for what in ("memory", "operations"))
    through = [f"{beside(steps, ENCODER, what):+.0%}" for what in ("memory", "operations")]
    near = abs(memory - MEMORY) <= NEAR and abs(operations - TIME) <= NEAR
    words = f"SD 1.5: {memory:+.0%} memory (the paper: {MEMORY:+.0%}), {operations:+.0%} arithmetic (time: {TIME:+.0%})"
    return Verdict(near, f"{words}; with gradients of all locked weights {through[0]} and {through[1]}")


EXPERIMENT = Experiment(
    title="Cost (section 3.2)",
    claim="As the locked encoder needs no gradients, training a ControlNet takes only about 23% more memory and 34% "
    "more time in each iteration than training Stable Diffusion without it.",
    how="Memory is that of weights, gradients, AdamW's moments and activations, all fp32, counted with tensors that "
    "have shapes only; so is arithmetic, which stands for the time of SD 1.5. Percentages are beside the first row. "
    "The paper does not say what was trained beside it; its code leaves the decoder's gradients on (third row). A "
    "fine-tuned base has gradients and moments of all its weights, a ControlNet's base has none.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
