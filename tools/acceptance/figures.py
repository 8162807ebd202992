"""The stages that measure: time, memory, and where both go. Little of it must hold; aims are recorded as such."""

import json
import platform
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from controlnet.common.devices import PRECISIONS
from ldm.unet import set_checkpointing
from tools import bench, bench_ours
from tools.bench_case import Work, timed
from tools.bench_ours import Training

from . import device
from .behind import cases, denoiser
from .job import Job
from .report import Report

PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "diffusers", "transformers")
AIMS = {"1 image": 1.5, "images at once": 1.5, "latents before": 1.3, "latents in it": 1.15}  # times as fast
MEMORY_AIM = 0.8  # of diffusers'
LONGEST = 30  # operations of a profile

Works = dict[str, Work]  # by what they are called


def machine(job: Job, report: Report) -> None:
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            report.note(package, version(package))
    for what, value in {"python": platform.python_version(), **device.describe(job.device)}.items():
        report.note(what, value)
    n = job.size.matrix
    matrix = torch.rand(n, n, device=job.device).bfloat16()
    copy = torch.empty_like(matrix)
    time = partial(device.median_seconds, device=job.device, runs=job.size.runs)
    report.note(f"bf16 product of {n}x{n}, TFLOP/s", 2 * n**3 / time(lambda: matrix @ matrix) / 1e12)
    report.note("copying there, read and written, GB/s", 2 * matrix.nbytes / time(lambda: copy.copy_(matrix)) / 1e9)


# -------------------------------------------------------------------------------------------------- beside diffusers


@dataclass
class Side:
    """Ours or diffusers': what is loaded, the works to measure with it, and bytes for each."""

    source: Any
    works: Works
    lasting: float  # what stays allocated between the works
    memory: dict[str, float] = field(default_factory=dict)


def peers(job: Job, report: Report) -> None:
    job.need_weights()
    if not bench.have_peers():
        report.note("diffusers", "skipped, as it is not installed: ours is measured alone")
    sides = both(job, our_images, their_images)
    compare(job, report, sides, "")
    del sides
    job.settle()
    sides = both(job, our_steps, their_steps)
    compare(job, report, sides, ", latents in it")
    use_cache(job, sides["ours"])
    compare(job, report, sides, ", latents before")


def both(job: Job, *loaders: Callable[[Job], tuple[Any, Works, Works]]) -> dict[str, Side]:
    """Ours, and diffusers' if it is installed, each warmed up. A loader gives the source, the works to time, and those
    whose memory is measured."""
    sides = {}
    for name, load in zip(("ours", "diffusers") if bench.have_peers() else ("ours",), loaders, strict=False):
        before = device.allocated(job.device)
        source, works, measured = load(job)
        warm_up(works)
        sides[name] = Side(source, works, device.allocated(job.device) - before)
        measure_memory(job, sides[name], measured)
    return sides


def warm_up(works: Works) -> None:
    for work in works.values():
        for _ in range(device.WARM_UPS):
            work()


def measure_memory(job: Job, side: Side, works: Works) -> None:
    """Of each work, whatever else is on the device: what stays, and its peak above what is there before it."""
    for name, work in works.items():
        before = device.allocated(job.device)
        side.memory[name] = side.lasting + device.with_peaks(work, job.device)[1] - before


def compare(job: Job, report: Report, sides: dict[str, Side], how: str) -> None:
    for name in sides["ours"].works:
        times = {side: [] for side in sides}
        for i in range(job.size.runs):
            for side in list(sides)[:: -1 if i % 2 else 1]:
                times[side].append(timed(sides[side].works[name], str(job.device))[0])
        medians, memory = {side: statistics.median(values) for side, values in times.items()}, {}
        for side in sides:
            memory[side] = sides[side].memory[name] / 1e9
            report.note(f"{name}{how}: {side}, s", medians[side])
            report.note(f"{name}{how}: {side}, GB", memory[side])
        if len(sides) == 2:
            least = next((aim for words, aim in AIMS.items() if words in name + how), 1.0)
            report.aim(f"{name}{how}: times as fast as diffusers", medians["diffusers"] / medians["ours"], least=least)
            share = memory["ours"] / memory["diffusers"]
            report.aim(f"{name}{how}: memory in parts of diffusers'", share, most=MEMORY_AIM)


def our_images(job: Job) -> tuple[Any, Works, Works]:
    sd, control = bench_ours.load_for_sampling(job.setup())
    works = image_works(job, partial(bench_ours.sample, sd, control), sd.vae.encode, sd.vae.decode)
    return sd, works, works


def their_images(job: Job) -> tuple[Any, Works, Works]:
    from tools import bench_peers  # imports diffusers

    pipeline = bench_peers.load(job.setup())
    vae, scale = pipeline.vae, pipeline.vae.config.scaling_factor
    ways = (lambda x: vae.encode(x).latent_dist.mean * scale, lambda z: vae.decode(z / scale).sample)
    works = image_works(job, partial(bench_peers.sample, pipeline), *ways)
    return pipeline, works, works


def image_works(job: Job, sample: Callable, encode: Callable, decode: Callable) -> Works:
    setup = job.setup()
    dtype = PRECISIONS[setup.precision]
    images, _, latents, *_ = (x.to(job.device, dtype) for x in bench_ours.inputs(setup.size))
    sampled = partial(sample, setup.size, setup.steps, setup.cfg)
    return {
        "1 image": partial(sampled, 1),
        f"{job.size.count} images at once": partial(sampled, job.size.count),
        "VAE, encoding": torch.no_grad()(lambda: encode(images)),
        "VAE, decoding": torch.no_grad()(lambda: decode(latents)),
    }


def our_steps(job: Job) -> tuple[Any, Works, Works]:
    run = Training(job.setup())
    return run, *our_step_works(job, run, cached=False)


def our_step_works(job: Job, run: Training, cached: bool) -> tuple[Works, Works]:
    """As they are, and as they are without CUDA graphs, whose memory counts as free."""
    return tuple(step_works(job, partial(run.step, cached=cached, record=record)) for record in (True, False))


def their_steps(job: Job) -> tuple[Any, Works, Works]:
    from tools import bench_peers

    step = bench_peers.trainer(job.setup())
    works = step_works(job, step)
    return step, works, works


def step_works(job: Job, step: Callable[[int], Work]) -> Works:
    return {f"a training step, batch {batch}": step(batch) for batch in job.size.batches}


def use_cache(job: Job, side: Side) -> None:
    """From here on latents are computed before, and the encoders leave the device."""
    before = device.allocated(job.device)
    side.works, measured = our_step_works(job, side.source, cached=True)
    side.source.drop_encoders()
    warm_up(side.works)
    side.lasting += device.allocated(job.device) - before
    measure_memory(job, side, measured)


# ------------------------------------------------------------------------------------------------------- memory, time


def memory(job: Job, report: Report) -> None:
    """Of training steps: what train.py --dry-run says, what was allocated, and what PyTorch held for it."""
    predictions = json.loads(job.from_behind("predictions.json").read_text())
    before = device.allocated(job.device)
    run = Training(job.setup())
    works = {}
    for what, settings in cases(job.size).items():
        works[what] = settings, run.step(settings.batch_size, True, settings.accumulate, record=False)
    run.drop_encoders()
    for what, (settings, work) in works.items():
        for network in (run.sd.unet, run.control):
            set_checkpointing(network, settings.checkpointing)
        work()  # the optimizer's moments exist from here on
        _, allocated, reserved = device.with_peaks(work, job.device)
        for words, size in zip(("predicted for tensors", "predicted in all"), predictions[what], strict=True):
            report.note(f"{what}: {words}, GB", size / 1e9)
        report.note(f"{what}: allocated, GB", (allocated - before) / 1e9)
        report.note(f"{what}: reserved, GB", (reserved - before) / 1e9)


def profile(job: Job, report: Report) -> None:
    job.need_weights()
    sd, control = bench_ours.load(job.setup())
    look_at(job, report, "a denoising step", partial(denoiser(job, sd, control), 501))
    del sd, control
    job.settle()
    step = Training(job.setup()).step(job.size.batches[0], cached=True, record=False)  # of a replay little is seen
    look_at(job, report, "a training step", step)


def look_at(job: Job, report: Report, what: str, work: Work) -> None:
    for _ in range(2):
        work()
    waits = device.waits(work, job.device)
    report.note(f"{what}: waits for the device", len(waits))
    for place in dict.fromkeys(waits):
        report.note(f"{what}: waits at {place}", waits.count(place))
    events = device.profiled(work, job.device)
    slow = sum(calls for name, calls, _ in events if "_attention_math" in name)
    report.must(f"{what}: attention without a fused kernel", slow, most=0)
    for name, calls, microseconds in events[:LONGEST]:
        report.note(f"{what}: {calls} x {name[:80]}, ms", microseconds / 1e3)
