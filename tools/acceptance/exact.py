"""The stages that compare with the CPU: does the device compute the same?"""

import math
from functools import partial

import torch
from torch import Tensor

from tools.bench import psnr
from tools.bench_case import to_numpy

from .compared import CFG, outputs, pictures, training_step
from .job import Job
from .report import Report

FORWARD = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2}  # the largest relative L2 error; fp32 is without TF32
# Guidance multiplies the difference of two outputs, and with it their errors: in bf16, with these weights of SD 1.5's
# width, from 1.5e-2 to 4.4e-2.
GUIDED = 2
COSINE = {"fp16": 0.999, "bf16": 0.99}


def weights(job: Job, report: Report) -> None:
    job.need_weights()
    report.note("bytes, both layouts", sum(path.stat().st_size for path in job.folder.rglob("*.safetensors")))
    job.begin_in_background()


def forward(job: Job, report: Report) -> None:
    reference = job.reference()
    for precision, most in FORWARD.items():
        for name, value in outputs(job, precision):
            allowed = most * (GUIDED if f"cfg {CFG:g}" in name else 1)
            report.must(f"{name}, {precision}", relative(value, reference[name]), most=allowed)
    found, wanted = (to_numpy(x) for x in (pictures(job, "fp32"), reference["pictures"]))
    report.must("small pictures, fp32: levels of 255", int(abs(found.astype(int) - wanted).max()), most=2)
    report.must("small pictures, fp16: PSNR, dB", psnr(to_numpy(pictures(job, "fp16")), wanted), least=40)


def step(job: Job, report: Report) -> None:
    reference = job.reference()
    names = [name for name in reference if name.startswith("gradient of ")]
    report.note("gradients", len(names))
    for precision in FORWARD:
        found = training_step(job, precision)
        errors = {name: relative(found[name], reference[name]) for name in ("loss", "norm", *names)}
        worst = max(names, key=errors.get)
        for what, name, most in (("loss", "loss", 1e-6), ("norm", "norm", 1e-5), (f"the worst {worst}", worst, 1e-4)):
            say = partial(report.must, most=most) if precision == "fp32" else report.note
            say(f"{what}, {precision}", errors[name])
        if precision in COSINE:
            cosine = cosine_of([found[name] for name in names], [reference[name] for name in names])
            report.must(f"cosine of all gradients, {precision}", cosine, least=COSINE[precision])
        del found


def relative(found: Tensor, wanted: Tensor) -> float:
    """The relative L2 error: inf if it is not finite, and 0 if both are zero."""
    if found.shape != wanted.shape:
        return math.inf
    found, wanted = found.double(), wanted.to(found.device).double()
    error, norm = (found - wanted).norm().item(), wanted.norm().item()
    return (error / norm if norm else (math.inf if error else 0.0)) if math.isfinite(error) else math.inf


def cosine_of(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Of the angle between two lists of tensors, each taken as one long vector."""
    pairs = [(a.double(), b.to(a.device).double()) for a, b in zip(found, wanted, strict=True)]
    products = [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]) for a, b in pairs]
    ab, aa, bb = torch.stack(products).sum(dim=0).tolist()
    return ab / math.sqrt(aa * bb) if aa * bb > 0 else math.nan
