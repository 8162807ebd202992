"""Diffusers' side of what tools.bench measures: the tasks of bench_ours.py, each as its users would do them.

Needs tests/requirements-interop.txt.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from controlnet.common.devices import PRECISIONS
from tools.bench_case import Outputs, Setup, Work
from tools.bench_ours import LEARNING_RATE, NEGATIVE, PROMPT, SEED, SMALL_SIDE, inputs, pixels, read_all


def load(setup: Setup) -> StableDiffusionControlNetPipeline:
    dtype = PRECISIONS[setup.precision]
    control = ControlNetModel.from_pretrained(setup.folder / "control", dtype=dtype)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(setup.folder / "base", controlnet=control, dtype=dtype)
    return pipeline.to(setup.device)


def sampling(setup: Setup) -> Work:
    return partial(sample, load(setup), setup.size, setup.steps, setup.cfg)


def sample(pipeline: StableDiffusionControlNetPipeline, side: int, steps: int, cfg: float, count: int = 1) -> Outputs:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(count)]  # as in `generate`
    noise = torch.cat([torch.randn(1, 4, side // 8, side // 8, generator=generator) for generator in generators])
    latents = []  # after each step

    def keep(pipeline, i, t, values: dict) -> dict:
        latents.append(values["latents"])
        return values

    settings = {"num_inference_steps": steps, "guidance_scale": cfg, "negative_prompt": NEGATIVE}
    settings |= {"latents": noise.to(pipeline.unet.dtype), "callback_on_step_end": keep}
    images = pipeline(PROMPT, image=inputs(side)[1], num_images_per_prompt=count, **settings).images
    return {"latents": latents[-1], "images": torch.stack(list(map(pixels, images)))}


def load_vae(setup: Setup) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(setup.folder / "base", subfolder="vae", dtype=PRECISIONS[setup.precision])
    return vae.to(setup.device)


def vae(setup: Setup, encode: bool, tiled: bool) -> Work:
    """Our tiled VAE, too, is compared with their plain one: theirs in tiles is an approximation."""
    model = load_vae(setup)
    images, _, latents, *_ = (x.to(model.device, model.dtype) for x in inputs(setup.size))
    encoded, decoded = vae_ways(model)
    return torch.no_grad()(lambda: {"output": encoded(images) if encode else decoded(latents)})


def vae_ways(model: AutoencoderKL) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """images -> scaled latents, and back."""
    scale = model.config.scaling_factor
    return lambda images: model.encode(images).latent_dist.mean * scale, lambda z: model.decode(z / scale).sample


def training(setup: Setup, cached: bool) -> Work:
    """Cached or not it is the same: their script has no cache."""
    return trainer(setup)(setup.batch_size)


def trainer(setup: Setup) -> Callable[[int], Work]:
    """batch size -> one step as in examples/controlnet/train_controlnet.py, with its optimizer, from a batch whose
    prompts are tokens. As there only the ControlNet, in fp32, is under autocast: the locked networks are themselves in
    half precision."""
    base, device, dtype = setup.folder / "base", torch.device(setup.device), PRECISIONS[setup.precision]
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").to(device, dtype).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").to(device, dtype).requires_grad_(False)
    vae = load_vae(setup).requires_grad_(False)
    control = ControlNetModel.from_pretrained(setup.folder / "control", dtype=torch.float32).to(device).train()
    if setup.checkpointing:
        control.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(control.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=setup.precision == "fp16")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step(batch_size: int) -> Work:
        images, hints, noise, posterior_noise, t = (x.to(device) for x in inputs(setup.size, batch_size))
        prompts = [PROMPT] * batch_size
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids

        def work() -> Outputs:
            posterior = vae.encode(images.to(dtype)).latent_dist
            # Their `posterior.sample()`, with the same noise as ours.
            latents = (posterior.mean + posterior.std * posterior_noise).to(dtype) * vae.config.scaling_factor
            noisy = scheduler.add_noise(latents.float(), noise, t).to(dtype)
            context = text_encoder(ids.to(device), return_dict=False)[0]
            with autocast:
                down, middle = control(noisy, t, context, controlnet_cond=hints.to(dtype), return_dict=False)
            residuals = {"down_block_additional_residuals": [residual.to(dtype) for residual in down]}
            residuals["mid_block_additional_residual"] = middle.to(dtype)
            output = unet(noisy, t, context, **residuals, return_dict=False)[0]
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(latents.float(), noise, t) if velocity else noise
            loss = F.mse_loss(output.float(), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(control.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return {"loss": loss.detach(), "gradient": norm}

        return work

    return step


def loading(setup: Setup) -> Work:
    """`from_single_file`, with the architecture from the folder: nothing is downloaded."""

    def work() -> Callable[[], Outputs]:
        options = {"dtype": PRECISIONS[setup.precision], "local_files_only": True}
        control = ControlNetModel.from_single_file(
            str(setup.folder / "control.safetensors"), config=str(setup.folder / "control"), **options
        )
        pipeline = StableDiffusionControlNetPipeline.from_single_file(
            str(setup.folder / "base.safetensors"), config=str(setup.folder / "base"), controlnet=control, **options
        ).to(setup.device)
        read_all(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.controlnet)
        return partial(sample, pipeline, SMALL_SIDE, 1, setup.cfg)

    return work
