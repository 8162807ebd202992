"""Diffusers' layout beside its tensors: a folder of JSON files that describe the architecture, read and written.

The numbers are the same as ours under other names (`attention_head_dim` is the number of heads). What is written
loads with `StableDiffusionPipeline.from_pretrained`, or for inpainting models `StableDiffusionInpaintPipeline`.
"""

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ldm.config import PRESETS, Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.tokenizer import byte_symbols, merge_table

from .files import new_folder
from .save import save_checkpoint

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

# ------------------------------------------------------------------------------------------------------------ read
# A value that a file leaves out is taken to be that of SD 1.x, which is not always diffusers' default.


def config_from_diffusers(configs: dict[str, dict], prediction: str | None) -> Config:
    """The configurations of a folder by component -> ours. `prediction`, if given, comes before the scheduler's.

    Raises KeyError, TypeError, ValueError or AttributeError for values that make no sense.
    """
    unet = unet_from_diffusers(configs["unet"])
    vae = vae_from_diffusers(configs.get("vae", {}))
    config = Config(
        "diffusers",
        unet,
        vae,
        text_from_diffusers(configs["text_encoder"]),
        schedule_from_diffusers(configs.get("scheduler", {}), prediction),
        sample_size(configs["unet"]) * vae.downscale,
    )
    return next((preset for name, preset in PRESETS.items() if preset == replace(config, name=name)), config)


def sample_size(values: dict) -> int:
    size = values.get("sample_size", 64)
    if type(size) is not int:
        raise TypeError(f"sample_size is {size!r:.80}")
    return size


def unet_from_diffusers(values: dict) -> UNetConfig:
    channels, multipliers = widths_from_diffusers(values, [320, 640, 1280, 1280])
    heads = values.get("num_attention_heads", values.get("attention_head_dim", 8))
    attention = values.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    linear = values.get("use_linear_projection", False)
    return UNetConfig(
        channels,
        multipliers,
        blocks=values.get("layers_per_block", 2),
        attention=tuple(kind == "CrossAttnDownBlock2D" for kind in attention),
        heads=tuple(heads if isinstance(heads, list) else [heads] * len(multipliers)),
        context_width=values.get("cross_attention_dim", 768),
        linear_projections=linear,
        fp32_logits=linear or values.get("upcast_attention", False),
        groups=values.get("norm_num_groups", 32),
        latent_channels=values.get("out_channels", 4),
        inpainting=values.get("in_channels") == 2 * values.get("out_channels", 4) + 1,
    )


def widths_from_diffusers(values: dict, default: list[int]) -> tuple[int, tuple[int, ...]]:
    """-> the channels of level 0, and each level's multiple of them."""
    widths = values.get("block_out_channels", default)
    if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
        raise TypeError(f"block_out_channels is {widths!r:.80}")
    if not widths or any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels {widths!s:.80} are not multiples of the first")
    return widths[0], tuple(width // widths[0] for width in widths)


def vae_from_diffusers(values: dict) -> VAEConfig:
    return VAEConfig(
        *widths_from_diffusers(values, [128, 256, 512, 512]),
        blocks=values.get("layers_per_block", 2),
        groups=values.get("norm_num_groups", 32),
        latent_channels=values.get("latent_channels", 4),
        scale=values.get("scaling_factor", 0.18215),
    )


def text_from_diffusers(values: dict) -> TextConfig:
    """The exact GELU means SD 2.x, whose last layer, which is never used, is left out in this layout."""
    open_clip = values.get("hidden_act", "quick_gelu") == "gelu"
    return TextConfig(
        "open_clip" if open_clip else "clip",
        width=values.get("hidden_size", 768),
        heads=values.get("num_attention_heads", 12),
        layers=values.get("num_hidden_layers", 12) + open_clip,
        vocabulary=vocabulary_from_diffusers(values),
        positions=values.get("max_position_embeddings", 77),
    )


def vocabulary_from_diffusers(values: dict) -> int:
    """Without tokens that were added to it. The end token was the last before; published files have a 2 for it."""
    size, end = values.get("vocab_size", 49408), values.get("eos_token_id")
    if type(size) is not int:
        raise TypeError(f"vocab_size is {size!r:.80}")
    return end + 1 if type(end) is int and 513 <= end < size else min(size, 49408)


def schedule_from_diffusers(values: dict, prediction: str | None) -> ScheduleConfig:
    found = {theirs: ours for ours, theirs in PREDICTIONS.items()}.get(values.get("prediction_type"))
    if values.get("beta_schedule", "scaled_linear") != "scaled_linear":
        raise ValueError(f'beta_schedule is {values["beta_schedule"]!r:.80}, expected "scaled_linear"')
    return ScheduleConfig(
        prediction or found or "eps",
        zero_terminal_snr=values.get("rescale_betas_zero_snr", False),
        beta_start=values.get("beta_start", 0.00085),
        beta_end=values.get("beta_end", 0.012),
        timesteps=values.get("num_train_timesteps", 1000),
    )


# ----------------------------------------------------------------------------------------------------------- write


def encoder_values(config: UNetConfig) -> dict:
    """Of the encoder half of a UNet."""
    heads = config.heads[0] if len(set(config.heads)) == 1 else list(config.heads)
    return {
        "in_channels": config.input_channels,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": config.groups,
        "norm_eps": 1e-05,
        "cross_attention_dim": config.context_width,
        "attention_head_dim": heads,
        "use_linear_projection": config.linear_projections,
        "upcast_attention": config.fp32_logits,
    }


def unet_values(config: Config) -> dict:
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.resolution // config.vae.downscale,
        "out_channels": config.unet.latent_channels,
        "center_input_sample": False,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.unet.attention)],
        **encoder_values(config.unet),
    }


def vae_values(config: Config) -> dict:
    levels = len(config.vae.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.vae.widths),
        "layers_per_block": config.vae.blocks,
        "act_fn": "silu",
        "latent_channels": config.vae.latent_channels,
        "norm_num_groups": config.vae.groups,
        "sample_size": config.resolution,
        "scaling_factor": config.vae.scale,
    }


def text_values(config: TextConfig) -> dict:
    clip = config.family == "clip"
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "projection_dim": 768 if clip else 512,  # of no use here; as in the published files
        "num_hidden_layers": config.layers if clip else config.layers - 1,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.positions,
        "hidden_act": "quick_gelu" if clip else "gelu",
        "layer_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "bos_token_id": config.vocabulary - 2,
        "eos_token_id": config.vocabulary - 1,
        "pad_token_id": config.vocabulary - 1 if clip else 0,
    }


def scheduler_values(config: ScheduleConfig) -> dict:
    """DDIM as the original repository runs it, or at trailing timesteps where x_T must be pure noise."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": config.zero_terminal_snr,  # whether the last step goes to the data: as in samplers.py
        "steps_offset": 1,
        "prediction_type": PREDICTIONS[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",
    }


MODEL_INDEX = {
    "_diffusers_version": "0.42.1",  # their pipeline for inpainting asks for one
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_pipeline(path: str | Path, config: Config, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A base as a folder. The keys of `tensors` begin with the component that they belong to.

    `metadata` go into the UNet's file. Raises ValueError if `path` exists and is not an empty folder.
    """
    components = {
        "unet": (WEIGHTS_NAME, unet_values(config), metadata),
        "vae": (WEIGHTS_NAME, vae_values(config), {}),
        "text_encoder": ("model.safetensors", text_values(config.text), {}),
    }
    with new_folder(path) as folder:
        for name, (file, values, described) in components.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            save_checkpoint(folder / name / file, own, described)
            write_json(folder / name / "config.json", values)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler_values(config.schedule))
        kind = "StableDiffusionInpaintPipeline" if config.unet.inpainting else "StableDiffusionPipeline"
        write_json(folder / "model_index.json", {"_class_name": kind, **MODEL_INDEX})
        write_tokenizer(folder / "tokenizer", config.text)


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, config: TextConfig) -> None:
    """Our table of merges in the files of transformers' CLIPTokenizer."""
    merges = merge_table(config.vocabulary - 514)
    start, end = "<|startoftext|>", "<|endoftext|>"
    symbols = [*byte_symbols(), *(left + right for left, right in merges), start, end]
    padding = end if config.family == "clip" else "!"
    special = {"bos_token": start, "eos_token": end, "pad_token": padding, "unk_token": end}
    write_json(folder / "vocab.json", {symbol: i for i, symbol in enumerate(symbols)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.positions, "do_lower_case": True, **special},
    )
