"""One run of infer.py: check everything, load the networks, make the images one by one."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from controlnet.common.devices import PRECISIONS, keep_freed_memory, pick_device
from controlnet.common.images import Size, save_png, to_uint8
from controlnet.common.program import free_place, from_json, note
from controlnet.guidance import Control, acting_timesteps
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import identify
from ldm.fast.packed import pack
from ldm.samplers import check_eta, timesteps_for
from ldm.schedule import Schedule
from ldm.stable_diffusion import StableDiffusion
from ldm.text_encoder import layers_to_run

from .generate import at_size, check_cfg, check_seeds, default_cfg, generate
from .image_to_image import Init, steps_done
from .inputs import CheckedHint, load_controls, read_inputs
from .options import RECORDED, HintOptions, Options, check_pairs
from .png_text import fingerprints, png_texts, read_settings
from .prompts import cut_texts


@dataclass(frozen=True)
class Job:
    """What is asked for, checked. No weights are read yet."""

    options: Options
    size: Size
    cfg: float
    device: torch.device
    init: Init | None
    hints: list[CheckedHint]
    steps: int  # that are done, and not left out by image-to-image
    files: dict[str, str]  # fingerprints, by the names given

    def settings(self, seed: int) -> dict:
        """All that makes the image with this seed again (png_text.py)."""
        settings = {name: getattr(self.options, name) for name in RECORDED}
        for item in fields(HintOptions):
            settings[item.name] = [getattr(hint.options, item.name) for hint in self.hints]
        size, strength = "{1}x{0}".format(*self.size), self.init.strength if self.init else None
        settings |= {"size": size, "strength": strength, "cfg": self.cfg, "device": str(self.device)}
        return {**settings, "seed": seed, "files": self.files}


def with_recorded(given: dict) -> tuple[Options, dict[str, str]]:
    """The options given, before those of the image for --again if there is one, and the fingerprints of its files."""
    path = given.get("again")
    if path is None:
        return Options(**given), {}
    recorded = read_settings(path, RECORDED)
    return Options(**{**from_json(Options, recorded, f'"{path}"'), **given}), recorded["files"]


def prepare(options: Options, recorded_files: dict[str, str]) -> Job:
    """Raises ValueError for all that can be wrong and is quick to see, CheckpointError for files that do not fit."""
    base, _ = find(options.base)
    config = identify(open_checkpoint(base), options.prediction).config
    cfg = default_cfg(config) if options.cfg is None else options.cfg
    timesteps = timesteps_for(options.sampler, Schedule(config.schedule), options.steps)
    check_cfg(cfg)
    check_eta(options.sampler, options.eta)
    check_seeds(options.seed, options.count)
    layers_to_run(config.text, options.clip_skip)
    device = pick_device(options.device)
    check_out(options.out)
    check_pairs(options)
    size, init, hints = read_inputs(options, config)
    steps = steps_done(init.strength, len(timesteps)) if init else len(timesteps)
    note_idle_hints(hints, steps)

    used = {options.base: base, **{name: Path(name) for name in (options.init, options.mask) if name}}
    for hint in hints:
        used |= hint.files()
    return Job(options, size, cfg, device, init, hints, steps, fingerprints(used, recorded_files))


def load(job: Job) -> tuple[StableDiffusion, list[Control]]:
    """The base and the controls, packed for the CPU. Raises CheckpointError for a ControlNet that does not fit."""
    options, home = job.options, job.device
    if options.low_memory:
        home = "cpu"
    else:
        keep_freed_memory(job.device, large=False)
    sd = StableDiffusion.load(options.base, home, PRECISIONS[options.dtype], options.prediction)
    note_cut_prompts(sd, options)
    controls = [at_size(control, job.size) for control in load_controls(job.hints, sd)]
    if not options.low_memory:  # which moves networks about, and needs plain weights for the tiled VAE
        pack(sd.unet, sd.vae, *(control.net for control in controls))
    return sd, controls


def save_hints(job: Job, controls: list[Control]) -> None:
    """As the model sees them: 0001-hint.png for 0001.png, with more than one hint 0001-hint-1.png and so on."""
    image = image_path(job.options.out, 0, job.options.count)
    for i, control in enumerate(controls):
        path = image.with_name(f"{image.stem}-hint{f'-{i + 1}' if len(controls) > 1 else ''}.png")
        save_png(Image.fromarray(to_uint8(control.hint[0].expand(3, -1, -1))), path, {})  # also of one channel
        note(f"the hint is saved as {path}")


def make_images(job: Job, sd: StableDiffusion, controls: list[Control]) -> Iterator[Image.Image]:
    """One by one, with a bar for all of them."""
    options = job.options
    with tqdm(total=options.count * job.steps, unit="step", disable=None) as bar:
        for i in range(options.count):
            yield from generate(
                sd,
                options.prompt,
                controls,
                negative=options.negative,
                size=job.size,
                steps=options.steps,
                sampler=options.sampler,
                cfg=job.cfg,
                eta=options.eta,
                seed=options.seed + i,
                init=job.init,
                clip_skip=options.clip_skip,
                long_prompts=options.long_prompts,
                reuse=options.reuse,
                cpu_offload=job.device if options.low_memory else None,
                callback=lambda progress: bar.update(),
            )


def save(job: Job, i: int, image: Image.Image) -> None:
    """Image i, with all that makes it again; its path is printed."""
    path = image_path(job.options.out, i, job.options.count)
    if path.exists():
        tqdm.write(f"{path} is replaced", file=sys.stderr)
    save_png(image, path, png_texts(job.settings(job.options.seed + i)))
    tqdm.write(str(path))


# --------------------------------------------------------------------------------------------------------- what is said


def note_idle_hints(hints: list[CheckedHint], steps: int) -> None:
    for hint in hints:
        start, end = hint.options.control_start, hint.options.control_end
        if not acting_timesteps(range(steps), start, end):
            note(f'"{hint.options.hint}" acts in none of the {steps} steps, from {start} to {end} of them')


def note_cut_prompts(sd: StableDiffusion, options: Options) -> None:
    """What the text encoder does not read has no effect."""
    for prompt in () if options.long_prompts else (options.prompt, options.negative):
        for text in cut_texts(sd.tokenizer, prompt):
            note(f'the prompt is too long, its end is ignored: "{text}" (--long-prompts reads it)')


# ----------------------------------------------------------------------------------------------------- where images go


def is_file_name(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def check_out(out: Path) -> None:
    """Raises ValueError for a place where no image can be saved, before time is spent on it."""
    other_formats = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    if out.suffix.lower() in other_formats or (is_file_name(out) and out.is_dir()):
        raise ValueError(f'--out is "{out}", expected a folder or the name of a file ending in .png')
    place = free_place(out.parent if is_file_name(out) else out)
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = "cannot be written to" if place.is_dir() else "is a file, not a folder"
        raise ValueError(f'--out is "{out}", but "{place}" {what}: give another folder, or a name ending in .png')


def image_path(out: Path, i: int, count: int) -> Path:
    """Where image i of `count` goes: the next free number in a folder; else the name given, numbered if needed."""
    if is_file_name(out):
        return out if count == 1 else out.with_name(f"{out.stem}-{i + 1}{out.suffix}")
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdecimal()]
    return out / f"{max(taken, default=0) + 1:04d}.png"
