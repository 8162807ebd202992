"""What people type who come from other trainers: their names for our options. Nothing here imports PyTorch."""

from difflib import get_close_matches

# Of diffusers' train_controlnet.py and of sd-scripts' train_control_net.py.
OURS = {
    "pretrained_model_name_or_path": "--base",
    "pretrained_vae_model_name_or_path": "--vae",
    "vae_name_or_path": "--vae",
    "controlnet_model_name_or_path": "--control",
    "v_parameterization": "--prediction v",
    "zero_terminal_snr": "--zero-snr",
    "dataset_name": "--data",
    "dataset_config": "--data",
    "train_data_dir": "--data",
    "conditioning_data_dir": "--data, for images and hints together",
    "in_json": "--data",
    "resolution": "--size",
    "max_train_samples": "--images",
    "proportion_empty_prompts": "--prompt-dropout",
    "caption_dropout_rate": "--prompt-dropout",
    "flip_aug": "--flip",
    "dataloader_num_workers": "--workers",
    "max_data_loader_n_workers": "--workers",
    "train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulate",
    "gradient_checkpointing": "--checkpointing",
    "max_train_steps": "--steps",
    "num_train_epochs": "--epochs",
    "max_train_epochs": "--epochs",
    "learning_rate": "--lr",
    "control_net_lr": "--lr",
    "lr_scheduler": "--lr-schedule",
    "lr_scheduler_type": "--lr-schedule",
    "lr_warmup_steps": "--warmup",
    "lr_num_cycles": "--lr-cycles",
    "lr_scheduler_num_cycles": "--lr-cycles",
    "lr_scheduler_power": "--lr-power",
    "use_8bit_adam": "--optimizer adamw8bit",
    "optimizer_type": "--optimizer",
    "max_grad_norm": "--clip",
    "use_ema": "--ema 0.9999",
    "snr_gamma": "--min-snr",
    "min_snr_gamma": "--min-snr",
    "mixed_precision": "--precision",
    "full_fp16": "--precision fp16",
    "full_bf16": "--precision bf16",
    "allow_tf32": "--precision tf32",
    "torch_compile": "--compile",
    "output_dir": "--out",
    "output_name": "--out",
    "resume_from_checkpoint": "--resume, with the run's --out",
    "save_state": "--save-every",
    "save_precision": "--save-dtype",
    "checkpointing_steps": "--save-every",
    "save_every_n_steps": "--save-every",
    "save_every_n_epochs": "--save-every, in steps or minutes",
    "checkpoints_total_limit": "--keep",
    "save_last_n_steps": "--keep",
    "save_last_n_epochs": "--keep",
    "validation_steps": "--sample-every",
    "sample_every_n_steps": "--sample-every",
    "validation_image": '--validate HINT "PROMPT"',
    "validation_prompt": '--validate HINT "PROMPT"',
    "sample_prompts": '--validate HINT "PROMPT"',
    "num_validation_images": "--sample-count",
    "report_to": "--log",
    "log_with": "--log",
    "tensorboard": "--log tensorboard",
    "logging_dir": "--log, in the folder --out",
}
# What is so without a word.
NOT_NEEDED = {
    "cache_latents": "latents are cached unless you say --no-cache",
    "cache_latents_to_disk": "latents are cached unless you say --no-cache",
    "enable_xformers_memory_efficient_attention": "attention is PyTorch's own, which needs as little memory",
    "xformers": "attention is PyTorch's own, which needs as little memory",
    "sdpa": "attention is PyTorch's own, which needs as little memory",
    "set_grads_to_none": "gradients are always set to None",
    "scale_lr": "--lr is taken as it is, for any batch",
    "image_column": "columns are known by their usual names",
    "conditioning_image_column": "columns are known by their usual names",
    "caption_column": "columns are known by their usual names",
    "tracker_project_name": "runs are named by --out",
    "log_tracker_name": "runs are named by --out",
    "save_model_as": "files are safetensors (`python -m tools.convert` makes others)",
}


def right_names(unknown: list[str], flags: list[str], resume: bool) -> str | None:
    """What to type in place of words that no option takes, one sentence; None if a word is like none that is known.

    `flags` are those that there are, `resume` whether --resume is given, to which others add a state's name.
    """
    said, is_value = [], False
    for word in unknown:
        if not word.startswith("--"):
            if is_value:
                continue
            if not resume or word.startswith("-"):
                return None
            said.append(f'--resume takes no value, found "{word}": it goes on with the newest state in --out')
            continue
        is_value = "=" not in word
        flag, name = word.split("=")[0], word[2:].split("=")[0].replace("-", "_")
        close = get_close_matches("--" + name.replace("_", "-"), flags, 1, 0.8)
        if name in OURS:
            said.append(f"{flag} is {OURS[name]} here")
        elif name in NOT_NEEDED:
            said.append(f"{flag} is not needed, {NOT_NEEDED[name]}")
        elif close:
            said.append(f"there is no {flag}, say {close[0]}")
        else:
            return None
    return "; ".join(dict.fromkeys(said))
