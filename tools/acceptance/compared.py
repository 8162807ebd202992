"""What is computed twice: on the device and, in other processes meanwhile, on the CPU in fp32.

Shapes: B batch, h = H/8, w = W/8, D context width.
"""

import json
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from controlnet.common.devices import PRECISIONS
from controlnet.config import ControlConfig
from controlnet.guidance import Control, guided
from controlnet.inference.generate import generate
from controlnet.model import ControlNet
from controlnet.training.memory import Prediction
from controlnet.training.options import TrainSettings
from controlnet.training.run_state import write_text
from ldm import StableDiffusion
from ldm.checkpoints.published import WEIGHTS
from ldm.checkpoints.save import save_checkpoint
from ldm.fast.tiled_vae import decode_tiled, posterior_tiled
from tools.bench_ours import NEGATIVE, PROMPT, ROOT, SEED, Training, inputs, load

from .job import Job, Size

TIMESTEPS = (1, 501, 981)
CFG = 7.5
LOSS_SCALE = {"fp32": 1.0, "fp16": 2.0**10, "bf16": 1.0}  # keeps the gradients in the range of fp16


@torch.no_grad()
def outputs(job: Job, precision: str) -> Iterator[tuple[str, Tensor]]:
    """(name, what the networks compute), each computed when it is asked for."""
    sd, control = load(job.setup(precision))
    images, _, latents, *_ = (x.to(job.device, sd.dtype) for x in inputs(job.size.side))
    yield "text", sd.encode_text([PROMPT, NEGATIVE])
    for cfg in (1.0, CFG):
        denoise = denoiser(job, sd, control, cfg)
        for t in TIMESTEPS:
            yield f"eps at t = {t}, cfg {cfg:g}", denoise(t)
    yield "VAE, encoding", sd.vae.encode(images)
    yield "VAE, encoding in tiles", sd.vae.config.scale * posterior_tiled(sd.vae, images).mean
    yield "VAE, decoding", sd.vae.decode(latents)
    yield "VAE, decoding in tiles", decode_tiled(sd.vae, latents)
    yield "SD 2.1, eps at t = 501", other_output(job, sd.dtype)


def denoiser(job: Job, sd: StableDiffusion, control: ControlNet, cfg: float = CFG) -> Callable[[int], Tensor]:
    """t -> the guided UNet's output for one image, (1, 4, h, w)."""
    _, hint, x, *_ = (x.to(job.device, sd.dtype) for x in inputs(job.size.side))
    with torch.no_grad():
        prompt, negative = sd.encode_text([PROMPT, NEGATIVE]).split(1)  # (1, 77, D)
    denoise = guided(sd.unet, prompt, negative, cfg, [Control(control, hint)])
    return torch.no_grad()(lambda t: denoise(x, torch.full((1,), t, device=job.device), t))


def other_output(job: Job, dtype: torch.dtype) -> Tensor:
    x = inputs(job.size.side, 2)[2].to(job.device, dtype)
    context = torch.randn(2, 77, job.size.other.context_width, generator=torch.Generator().manual_seed(SEED))
    t = torch.full((2,), 501, device=job.device)
    return job.other_unet(job.device, dtype)(x, t, context.to(job.device, dtype))


def pictures(job: Job, precision: str) -> Tensor:
    """Some images of the small model that ships, uint8 (N, H, W, 3)."""
    count, steps, side = job.size.pictures
    sd = StableDiffusion.load("tiny", job.device, PRECISIONS[precision])
    net = ControlNet.load(WEIGHTS / "tiny-fill50k.safetensors", sd)
    controls = [Control.from_image(net, ROOT / "assets" / "circle.png")]
    images = [generate(sd, PROMPT, controls, size=(side, side), steps=steps, seed=seed)[0] for seed in range(count)]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def training_step(job: Job, precision: str) -> dict[str, Tensor]:
    """The loss of one image, the norm of its gradient, and the gradient of each of the ControlNet's parameters."""
    run = Training(job.setup(precision))
    batch, scale = run.batch(1, cached=False)(), LOSS_SCALE[precision]
    with run.optimisation.autocast():
        loss = run.loss(*batch)
    (loss * scale).backward()
    gradients = {name: parameter.grad.float() / scale for name, parameter in run.control.named_parameters()}
    norm = nn.utils.get_total_norm([gradient.double() for gradient in gradients.values()])  # in fp32 off by 0.1%
    return {"loss": loss.detach().float(), "norm": norm, **{f"gradient of {k}": v for k, v in gradients.items()}}


# --------------------------------------------------------------------------------------------------- the processes


def write_reference(size: Size, folder: Path) -> None:
    os.nice(5)  # what runs in the foreground is timed
    torch.set_num_threads(max(1, torch.get_num_threads() - 4))
    job = Job(torch.device("cpu"), size, folder)
    tensors = dict(outputs(job, "fp32")) | training_step(job, "fp32")
    tensors["pictures"] = pictures(job, "fp32")
    save_checkpoint(folder / "reference.safetensors", tensors, {})


def write_predictions(size: Size, folder: Path, device_type: str) -> None:
    """The memory of training steps in bytes, by the names of `cases`: what tensors take, and the most in all."""
    os.nice(5)
    torch.set_num_threads(1)
    sizes, found = (size.side, size.side), {}
    for what, settings in cases(size).items():
        predict = Prediction(size.config, settings, sizes, ControlConfig(), torch.device(device_type))
        memory = predict(settings.batch_size)
        found[what] = memory.counted, memory.most
    write_text(folder / "predictions.json", json.dumps(found))


def cases(size: Size) -> dict[str, TrainSettings]:
    """The trainings whose memory is measured, with latents computed before."""
    return {
        f"batch {batch}{', checkpointing' * checkpointing}{', accumulate 2' * (accumulate == 2)}": TrainSettings(
            batch_size=batch,
            checkpointing=checkpointing,
            accumulate=accumulate,
            precision="fp16",
            optimizer="adamw",
            sample_count=0,
        )
        for batch, checkpointing, accumulate in product(size.memory_batches, (False, True), (1, 2))
    }
