"""Diffusers' side of what tools.bench measures: the tasks of bench_ours.py, each as its users would do them.

Needs tests/requirements-interop.txt.
"""

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from controlnet.common.devices import PRECISIONS
from tools.bench_ours import LEARNING_RATE, NEGATIVE, PROMPT, SMALL_SIDE, first_noise, inputs, pixels, read_all
from tools.bench_processes import Outputs, Setup, Work


def sampling(setup: Setup) -> Work:
    control = ControlNetModel.from_pretrained(setup.folder / "control", dtype=PRECISIONS[setup.precision])
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        setup.folder / "base", controlnet=control, dtype=PRECISIONS[setup.precision]
    ).to(setup.device)
    return lambda: picture(pipeline, setup.case.size, setup.case.steps, setup.case.cfg)


def picture(pipeline: StableDiffusionControlNetPipeline, side: int, steps: int, cfg: float) -> Outputs:
    pipeline.set_progress_bar_config(disable=True)
    latents = []  # after each step

    def keep(pipeline, i, t, values: dict) -> dict:
        latents.append(values["latents"])
        return values

    (made,) = pipeline(
        PROMPT,
        image=inputs(side, 1).hints,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=cfg,
        latents=first_noise(side).to(pipeline.unet.dtype),
        callback_on_step_end=keep,
    ).images
    return lambda: {"latents": latents[-1], "picture": pixels(made)}


def load_vae(setup: Setup) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(setup.folder / "base", subfolder="vae", dtype=PRECISIONS[setup.precision])
    return vae.to(setup.device)


def vae_encode(setup: Setup) -> Work:
    vae = load_vae(setup)
    images = inputs(setup.case.size, 1).images.to(vae.device, vae.dtype)

    @torch.no_grad()
    def work() -> Outputs:
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        return lambda: {"latents": latents}

    return work


def vae_decode(setup: Setup) -> Work:
    vae = load_vae(setup)
    latents = inputs(setup.case.size, 1).noise.to(vae.device, vae.dtype)

    @torch.no_grad()
    def work() -> Outputs:
        images = vae.decode(latents / vae.config.scaling_factor).sample
        return lambda: {"images": images}

    return work


def training(setup: Setup) -> Work:
    """One step in the sequence of examples/controlnet/train_controlnet.py, with its optimiser, from a batch whose
    prompts are tokens by then."""
    base, device, dtype = setup.folder / "base", torch.device(setup.device), PRECISIONS[setup.precision]
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").to(device, dtype).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").to(device, dtype).requires_grad_(False)
    vae = load_vae(setup).requires_grad_(False)
    control = ControlNetModel.from_pretrained(setup.folder / "control").to(device).train()
    if setup.case.checkpointing:
        control.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(control.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=setup.precision == "fp16")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    x = inputs(setup.case.size, setup.case.batch_size)._asdict()
    images, hints, noise, posterior_noise, t = (tensor.to(device) for tensor in x.values())
    prompts = [PROMPT] * setup.case.batch_size
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids

    def work() -> Outputs:
        posterior = vae.encode(images.to(dtype)).latent_dist
        # Their `posterior.sample()`, with the noise that is ours, too.
        latents = (posterior.mean + posterior.std * posterior_noise).to(dtype) * vae.config.scaling_factor
        noisy = scheduler.add_noise(latents.float(), noise, t).to(dtype)
        context = text_encoder(ids.to(device), return_dict=False)[0]
        with autocast:
            down, middle = control(noisy, t, context, controlnet_cond=hints, return_dict=False)
            output = unet(
                noisy,
                t,
                context,
                down_block_additional_residuals=[residual.to(dtype) for residual in down],
                mid_block_additional_residual=middle.to(dtype),
                return_dict=False,
            )[0]
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents.float(), noise, t) if velocity else noise
        loss = F.mse_loss(output.float(), target, reduction="mean")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return lambda: {"loss": loss, "gradient": norm}

    return work


def loading(setup: Setup) -> Work:
    """`from_single_file`, with the architecture from the folder: nothing is downloaded."""

    def work() -> Outputs:
        options = {"dtype": PRECISIONS[setup.precision], "local_files_only": True}
        control = ControlNetModel.from_single_file(
            str(setup.folder / "control.safetensors"), config=str(setup.folder / "control"), **options
        )
        pipeline = StableDiffusionControlNetPipeline.from_single_file(
            str(setup.folder / "base.safetensors"), config=str(setup.folder / "base"), controlnet=control, **options
        ).to(setup.device)
        read_all(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.controlnet)
        return lambda: picture(pipeline, SMALL_SIDE, 1, setup.case.cfg)()

    return work
