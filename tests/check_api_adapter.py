"""Answers the calls of check_api.py, the program that comes with the reference numbers.

    python check_api.py --adapter tests/check_api_adapter.py

It describes each function; tensors are fp32 on the CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from controlnet.config import ControlConfig
from controlnet.layouts import control_map, diffusers_control_map
from controlnet.model import ControlNet
from ldm import StableDiffusion, samplers
from ldm.blocks import sinusoidal_embedding
from ldm.checkpoints.key_maps import base_maps
from ldm.checkpoints.open import open_checkpoint
from ldm.config import SD15, SD21, Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.samplers import Prediction, ddim_sigma, ddim_timesteps, dpmpp_step, sample_loop
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet

FAMILIES = {"sd1": "clip", "sd2": "open_clip"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}


# ------------------------------------------------------------------------------------------------------------ models


def config_of(cfg):
    """An entry of configs.json as our Config."""
    unet, vae, text = cfg["unet"], cfg["vae"], cfg["text"]
    widths = [unet["model_channels"] * m for m in unet["channel_mult"]]
    heads = [unet.get("num_heads") or width // unet["num_head_channels"] for width in widths]
    linear = unet.get("use_linear_in_transformer", False)
    return Config(
        "reference",
        unet=UNetConfig(
            channels=unet["model_channels"],
            multipliers=tuple(unet["channel_mult"]),
            blocks=unet["num_res_blocks"],
            attention=tuple(2**level in unet["attention_resolutions"] for level in range(len(widths))),
            heads=tuple(heads),
            context_width=unet["context_dim"],
            linear_projections=linear,
            fp32_logits=linear,
        ),
        vae=VAEConfig(channels=vae["ch"], multipliers=tuple(vae["ch_mult"]), blocks=vae["num_res_blocks"]),
        text=TextConfig(
            "clip" if text["kind"] == "clip" else "open_clip",
            width=text["width"],
            heads=text["heads"],
            layers=text["layers"],
            vocabulary=text["vocab"],
            positions=text["positions"],
        ),
        schedule=ScheduleConfig(cfg["parameterization"]),
    )


def load_sd(path, cfg):
    return StableDiffusion.from_checkpoint(open_checkpoint(path), config_of(cfg))


def load_control(path, cfg):
    with torch.device("meta"):
        unet = UNet(config_of(cfg).unet)
    return ControlNet.load(path, unet, "cpu", torch.float32)


def tokenize(prompts, style):
    return Tokenizer(TextConfig(FAMILIES[style]))(prompts)


def text(sd, ids, clip_skip=1):
    return sd.text_encoder(ids, clip_skip)


def with_middle_alone(residuals):
    return [torch.zeros_like(residual) for residual in residuals[:-1]] + [residuals[-1]]


def eps(sd, x, t, context, residuals=None, only_mid=False):
    return sd.unet(x, t, context, with_middle_alone(residuals) if only_mid else residuals)


def control(control, x, hint, t, context):
    return control(x, t, context, hint)


def hint_features(control, hint):
    return control.hint_encoder(hint)


def vae_encode(sd, image):
    posterior = sd.vae.posterior(image)
    return posterior.mean, posterior.logvar


def vae_decode(sd, latent):
    return sd.decode(latent)


# ---------------------------------------------------------------------------------------------------------- sampling


def schedule():
    ours = Schedule(ScheduleConfig())
    return {
        "betas": ours.betas.float(),
        "betas_f64": ours.betas,
        "alphas_cumprod": ours.alphas_cumprod,
        "sqrt_alphas_cumprod": ours.alpha,
        "sqrt_one_minus_alphas_cumprod": ours.sigma,
    }


def timestep_embedding(t, dim):
    return sinusoidal_embedding(t, dim)


def ddim_schedule(S, eta):
    ours = Schedule(ScheduleConfig())
    timesteps = ddim_timesteps(ours, S)[::-1]
    alphas = ours.alphas_cumprod[timesteps].double()
    before = torch.cat([ours.alphas_cumprod[:1].double(), alphas[:-1]])
    sigmas = [ddim_sigma(a, a_next, eta) for a, a_next in zip(alphas.tolist(), before.tolist(), strict=True)]
    return {"timesteps": timesteps, "alphas": alphas, "alphas_prev": before, "sigmas": torch.tensor(sigmas)}


def ddim_sample(
    sd,
    control,
    x_T,
    context,
    uncond,
    hint,
    steps,
    cfg_scale,
    eta=0.0,
    noises=None,
    control_scales=None,
    guess=False,
    only_mid=False,
):
    def output(x, t, prompt, controlled):
        if not controlled:
            return sd.unet(x, t, prompt)
        residuals = [scale * r for scale, r in zip(control_scales, control(x, t, prompt, hint), strict=True)]
        return sd.unet(x, t, prompt, with_middle_alone(residuals) if only_mid else residuals)

    def denoise(x, t, timestep):
        conditional = output(x, t, context, hint is not None)
        if cfg_scale == 1:
            return conditional
        unconditional = output(x, t, uncond, hint is not None and not guess)
        return unconditional + cfg_scale * (conditional - unconditional)

    draws = iter(noises if noises is not None else ())
    found = []
    sample_loop(
        "ddim",
        denoise,
        x_T,
        ddim_timesteps(sd.schedule, steps),
        sd.schedule,
        eta,
        noise=lambda x: next(draws),
        on_step=lambda i, x, x0: found.append(x),
    )
    return found


def dpmpp_levels(spec):
    """Alpha bar at each step of a case and at its end. Its spacings and ends go beyond those of ldm.samplers."""
    T, steps, table = spec["num_train_timesteps"], spec["steps"], Schedule(ScheduleConfig()).alphas_cumprod.double()
    sigmas = ((1 - table) / table).sqrt()
    if spec.get("use_karras_sigmas"):
        ramp = torch.linspace(sigmas[-1] ** (1 / 7), sigmas[0] ** (1 / 7), steps, dtype=torch.float64)
        sigmas_used = ramp**7
    else:
        timesteps = {
            "linspace": [round(i * (T - 1) / steps) for i in range(steps, 0, -1)],
            "leading": [i * (T // (steps + 1)) + spec["steps_offset"] for i in range(steps, 0, -1)],
            "trailing": [round(T - i * T / steps) - 1 for i in range(steps)],
        }[spec["timestep_spacing"]]
        sigmas_used = sigmas[timesteps]
    end = sigmas[:1] if spec["final_sigmas_type"] == "sigma_min" else torch.zeros(1)
    return (1 / (1 + torch.cat([sigmas_used, end]) ** 2)).tolist()


def dpmpp(spec, x_T, model_outputs):
    a, v = dpmpp_levels(spec), spec["prediction_type"] == "v_prediction"
    x, past, found = x_T, (), []
    for i, output in enumerate(model_outputs):
        alpha, sigma = a[i] ** 0.5, (1 - a[i]) ** 0.5
        x0 = alpha * x - sigma * output if v else (x - sigma * output) / alpha
        first_order = spec["solver_order"] == 1 or i == spec["steps"] - 1
        now = Prediction(x, x0, None, a[i], None)
        x, past = dpmpp_step(now, a[i + 1], past=() if first_order else past), (now,)
        found.append(x)
    return torch.stack(found)


def ddpm_step(spec, t, prev_t, model_output, x, noise):
    ours = Schedule(ScheduleConfig(PREDICTIONS[spec["prediction"]]))
    x0 = ours.to_x0(x, torch.full((len(x),), t), model_output)
    a = ours.alphas_cumprod[t].item()
    a_next = ours.alphas_cumprod[prev_t].item() if prev_t >= 0 else 1.0
    return samplers.ddpm_step(Prediction(x, x0, None, a, None), a_next, noise=lambda x: noise)


# ---------------------------------------------------------------------------------------------------------- training


def train(sd, control, z0, t, noise, context, hint, only_mid=False):
    x = sd.schedule.q_sample(z0, t, noise)
    control.requires_grad_(True).zero_grad()  # what is loaded is locked
    with torch.no_grad():  # locked; the decoder carries the gradient to the residuals
        encoded = sd.unet.encoder(x, t, context)
    residuals = control(x, t, context, hint)
    output = sd.unet.decode(encoded, context, with_middle_alone(residuals) if only_mid else residuals)
    loss = F.mse_loss(output, sd.schedule.target(z0, t, noise))
    loss.backward()
    keys = control_map(control.encoder.config, control.config).sources(control.state_dict())
    gradients = {keys[name].key: parameter.grad for name, parameter in control.named_parameters()}
    return loss.item(), {key: grad.norm().item() for key, grad in gradients.items() if grad is not None}


# ------------------------------------------------------------------------------------------------------------- files


def diffusers_to_ldm(component, version):
    config = {"sd15": SD15, "sd21": SD21}[version]
    with torch.device("meta"):
        model = StableDiffusion(config)
        modules = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
        modules["controlnet"] = ControlNet(model.unet)
    maps = {
        layout: dict(zip(modules, (*base_maps(config, layout), make(config.unet, ControlConfig())), strict=True))
        for layout, make in (("ldm", control_map), ("diffusers", diffusers_control_map))
    }
    state = modules[component].state_dict()
    originals = maps["ldm"][component].sources(state)
    theirs = maps["diffusers"][component].sources(state)
    return {source.key.removeprefix(f"{component}."): originals[name].key for name, source in theirs.items()}


# ------------------------------------------------------------------------------------------------------------ probes

# A module by its LDM name -> ours, and what it is called with beside its input.
MODULES = {
    "control_model.input_blocks.4.1": ("control.encoder.blocks.4.transformer", "context"),
    "model.diffusion_model.input_blocks.3.0": ("unet.encoder.blocks.3.conv", None),
    "model.diffusion_model.input_blocks.4.0": ("unet.encoder.blocks.4.res", "emb"),
    "model.diffusion_model.input_blocks.4.1": ("unet.encoder.blocks.4.transformer", "context"),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0": (
        "unet.encoder.blocks.4.transformer.block",
        "context",
    ),
    "model.diffusion_model.input_blocks.5.0": ("unet.encoder.blocks.5.res", "emb"),
    "model.diffusion_model.middle_block.1": ("unet.encoder.middle.transformer", "context"),
    "model.diffusion_model.output_blocks.2.1": ("unet.decoder.blocks.2.upsample", None),
    "first_stage_model.encoder.down.0.downsample": ("vae.encoder.levels.0.resample", None),
    "first_stage_model.encoder.down.1.block.0": ("vae.encoder.levels.1.blocks.0", None),
    "first_stage_model.encoder.mid.attn_1": ("vae.encoder.middle.attention", None),
    "first_stage_model.encoder.norm_out": ("vae.encoder.norm_out", None),
    "first_stage_model.decoder.mid.block_1": ("vae.decoder.middle.res1", None),
    "first_stage_model.decoder.norm_out": ("vae.decoder.norm_out", None),
    "first_stage_model.decoder.up.3.upsample": ("vae.decoder.levels.3.resample", None),
    "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1": ("text_encoder.blocks.0.norm1", None),
    "cond_stage_model.transformer.text_model.final_layer_norm": ("text_encoder.final_norm", None),
    "cond_stage_model.model.ln_final": ("text_encoder.final_norm", None),
}


def probe(sd, control, module, x, emb, context):
    if module == "model.diffusion_model.out":  # three of our calls
        return sd.unet.decoder.conv_out(F.silu(sd.unet.decoder.norm_out(x)))
    if module not in MODULES:
        raise NotImplementedError(module)
    path, argument = MODULES[module]
    part, _, name = path.partition(".")
    ours = (control if part == "control" else getattr(sd, part)).get_submodule(name)
    arguments = {"emb": (emb,), "context": (context,), None: ()}[argument]
    return ours(x, *arguments)
