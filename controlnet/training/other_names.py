"""What people who come from other trainers type: their names for our options. Nothing here imports PyTorch."""

from difflib import get_close_matches

# What we say -> the names that diffusers' train_controlnet.py and sd-scripts' train_control_net.py have for it.
OURS = {
    "--base": "pretrained_model_name_or_path",
    "--vae": "pretrained_vae_model_name_or_path vae_name_or_path",
    "--control": "controlnet_model_name_or_path",
    "--prediction v": "v_parameterization",
    "--zero-snr": "zero_terminal_snr",
    "--data": "dataset_name dataset_config train_data_dir in_json",
    "--data, for images and hints together": "conditioning_data_dir",
    "--size": "resolution",
    "--images": "max_train_samples",
    "--prompt-dropout": "proportion_empty_prompts caption_dropout_rate",
    "--flip": "flip_aug",
    "--workers": "dataloader_num_workers max_data_loader_n_workers",
    "--batch-size": "train_batch_size",
    "--accumulate": "gradient_accumulation_steps",
    "--checkpointing": "gradient_checkpointing",
    "--steps": "max_train_steps",
    "--epochs": "num_train_epochs max_train_epochs",
    "--lr": "learning_rate control_net_lr",
    "--lr-schedule": "lr_scheduler lr_scheduler_type",
    "--warmup": "lr_warmup_steps",
    "--lr-cycles": "lr_num_cycles lr_scheduler_num_cycles",
    "--lr-power": "lr_scheduler_power",
    "--optimizer adamw8bit": "use_8bit_adam",
    "--optimizer": "optimizer_type",
    "--clip": "max_grad_norm",
    "--ema 0.9999": "use_ema",
    "--min-snr": "snr_gamma min_snr_gamma",
    "--precision": "mixed_precision",
    "--precision fp16": "full_fp16",
    "--precision bf16": "full_bf16",
    "--precision tf32": "allow_tf32",
    "--compile": "torch_compile",
    "--out": "output_dir output_name",
    "--resume, with the run's --out": "resume_from_checkpoint",
    "--save-every": "save_state checkpointing_steps save_every_n_steps",
    "--save-dtype": "save_precision",
    "--save-every, in steps or minutes": "save_every_n_epochs",
    "--keep": "checkpoints_total_limit save_last_n_steps save_last_n_epochs",
    "--sample-every": "validation_steps sample_every_n_steps",
    '--validate HINT "PROMPT"': "validation_image validation_prompt sample_prompts",
    "--sample-count": "num_validation_images",
    "--log": "report_to log_with",
    "--log tensorboard": "tensorboard",
    "--log, in the folder --out": "logging_dir",
}
# Why nothing needs to be said -> the names.
NOT_NEEDED = {
    "latents are cached unless you say --no-cache": "cache_latents cache_latents_to_disk",
    "attention is PyTorch's own, which needs as little memory": "xformers sdpa "
    "enable_xformers_memory_efficient_attention",
    "gradients are always set to None": "set_grads_to_none",
    "--lr is taken as it is, for any batch": "scale_lr",
    "columns are known by their usual names": "image_column conditioning_image_column caption_column",
    "runs are named by --out": "tracker_project_name log_tracker_name",
    "files are always safetensors, which other programs read": "save_model_as",
}


def right_names(unknown: list[str], flags: list[str], resume: bool) -> str | None:
    """What to type in place of words that no option takes, one sentence; None if a word resembles none that is known.

    `flags` are all that there are, `resume` says whether --resume is given, to which others add a state's name.
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
        flag, equals, _ = word.partition("=")
        is_value = not equals
        if ours := named_by(flag, OURS):
            said.append(f"{flag} is {ours} here")
        elif reason := named_by(flag, NOT_NEEDED):
            said.append(f"{flag} is not needed, {reason}")
        elif close := get_close_matches(flag.replace("_", "-"), flags, 1, 0.8):
            said.append(f"there is no {flag}, say {close[0]}")
        else:
            return None
    return "; ".join(dict.fromkeys(said))


def named_by(flag: str, table: dict[str, str]) -> str | None:
    name = flag[2:].replace("-", "_")
    return next((said for said, names in table.items() if name in names.split()), None)
