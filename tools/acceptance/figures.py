"""The stages that measure time and memory, and where both go. Most rows are figures and aims, which need not hold."""

import json
import platform
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from controlnet.common.devices import PRECISIONS
from ldm.unet import set_checkpointing
from tools import bench, bench_ours
from tools.bench_case import Work, timed
from tools.bench_ours import Training

from . import device
from .compared import cases, denoiser
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
    """Ours or diffusers': the works to time, and bytes for each."""

    works: Works
    memory: dict[str, float]


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
    del sides["ours"]
    job.settle()
    sides = {"ours": loaded(job, partial(our_steps, cached=True)), **sides}
    compare(job, report, sides, ", latents before")


def both(job: Job, ours: Callable, theirs: Callable) -> dict[str, Side]:
    """Ours and, if it is installed, diffusers'."""
    return {"ours": loaded(job, ours)} | ({"diffusers": loaded(job, theirs)} if bench.have_peers() else {})


def loaded(job: Job, load: Callable[[Job], tuple[Works, Works]]) -> Side:
    """A side, warmed up. `load` gives the works to time and, under the same names, those whose memory is measured: what
    stays allocated between them, and the peak of each above that, whatever else is on the device."""
    before = device.allocated(job.device)
    works, measured = load(job)
    for work in works.values():
        for _ in range(device.WARM_UPS):
            work()
    lasting, memory = device.allocated(job.device) - before, {}
    for name, work in measured.items():
        start = device.allocated(job.device)
        memory[name] = lasting + device.with_peaks(work, job.device)[1] - start
    return Side(works, memory)


def compare(job: Job, report: Report, sides: dict[str, Side], how: str) -> None:
    for name in sides["ours"].works:
        times = {side: [] for side in sides}
        for i in range(job.size.runs):
            for side in list(sides)[:: -1 if i % 2 else 1]:
                times[side].append(timed(sides[side].works[name], str(job.device))[0])
        medians = {side: statistics.median(values) for side, values in times.items()}
        memory = {side: sides[side].memory[name] / 1e9 for side in sides}
        for side in sides:
            report.note(f"{name}{how}: {side}, s", medians[side])
            report.note(f"{name}{how}: {side}, GB", memory[side])
        if len(sides) == 2:
            least = next((aim for words, aim in AIMS.items() if words in name + how), 1.0)
            report.aim(f"{name}{how}: times as fast as diffusers", medians["diffusers"] / medians["ours"], least=least)
            share = memory["ours"] / memory["diffusers"]
            report.aim(f"{name}{how}: memory in parts of diffusers'", share, most=MEMORY_AIM)


def our_images(job: Job) -> tuple[Works, Works]:
    sd, control = bench_ours.load_for_sampling(job.setup())
    works = image_works(job, partial(bench_ours.sample, sd, control), sd.vae.encode, sd.vae.decode)
    return works, works


def their_images(job: Job) -> tuple[Works, Works]:
    from tools import bench_peers  # imports diffusers

    pipeline = bench_peers.load(job.setup())
    works = image_works(job, partial(bench_peers.sample, pipeline), *bench_peers.vae_ways(pipeline.vae))
    return works, works


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


def our_steps(job: Job, cached: bool = False) -> tuple[Works, Works]:
    """With latents computed in each step, or before. Memory is measured without CUDA graphs, as theirs does not show as
    allocated."""
    run = Training(job.setup())
    works, measured = (step_works(job, partial(run.step, cached=cached, record=record)) for record in (True, False))
    if cached:
        run.drop_encoders()
    return works, measured


def their_steps(job: Job) -> tuple[Works, Works]:
    from tools import bench_peers

    works = step_works(job, bench_peers.trainer(job.setup()))
    return works, works


def step_works(job: Job, step: Callable[[int], Work]) -> Works:
    return {f"a training step, batch {batch}": step(batch) for batch in job.size.batches}


# ------------------------------------------------------------------------------------------------------- memory, time


def memory(job: Job, report: Report) -> None:
    """Of training steps: what train.py --dry-run says, what was allocated, and what PyTorch held for it."""
    predictions = json.loads(job.from_background("predictions.json").read_text())
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
    step = Training(job.setup()).step(job.size.batches[0], cached=True, record=False)  # little is seen of a replay
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
