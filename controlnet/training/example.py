"""What there is to try a trained ControlNet on: a hint, its prompt, and the command that makes an image of them."""

import shlex
from typing import NamedTuple

import numpy as np
from PIL import Image

from controlnet.common.images import save_png
from controlnet.worlds import Sample

from .options import TrainSettings
from .run_state import RunFolder


class Example(NamedTuple):
    file: str
    prompt: str
    mask: str | None = None  # of what is to be inpainted


def example_of(settings: TrainSettings, run: RunFolder, sample: Sample) -> Example:
    """The first of --validate, or `sample`: its hint is written into the run's folder or, with --detect, its image, of
    which infer.py makes the same hint. Inpainting needs a mask, too, which those of --validate lack."""
    inpaints = sample.hint.dtype != np.uint8  # a hint with a hole in it
    if settings.validate and not inpaints:
        return Example(*settings.validate[0])
    pixels = sample.image if settings.detect else sample.hint
    if pixels.shape[2] in (1, 3, 4):
        path = run.path / "example.png"
        save_png(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), path, {})
    else:
        path = run.path / "example.npy"
        np.save(path, pixels)
    if not inpaints:
        return Example(str(path), sample.caption)
    mask = run.path / "example-mask.png"
    save_png(Image.fromarray((sample.hint < 0).any(axis=2)), mask, {})
    return Example(str(path), sample.caption, str(mask))


def infer_command(settings: TrainSettings, run: RunFolder, example: Example) -> str:
    """The command that makes an image with the ControlNet of a run, on the base that it was trained on."""
    options = ["--base", str(run.base if settings.sd_unlocked else settings.base)]
    if not settings.sd_unlocked:  # whose file says all of this, and has it inside
        options += [word for lora in settings.lora for word in ("--lora", lora)]
        options += ["--vae", settings.vae] if settings.vae else []
        options += ["--prediction", settings.prediction] if settings.prediction else []
        options += ["--zero-snr"] if settings.zero_snr else []
    options += ["--control", str(run.control), "--hint", example.file]
    options += ["--detect", settings.detect] if settings.detect else []
    options += ["--mask", example.mask] if example.mask else []
    options += ["--size", settings.size] if settings.size else []
    return f"python infer.py {shlex.join([*options, '--prompt', example.prompt])}"
