"""One run of infer.py: check everything, load the networks, make the images one by one."""

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from controlnet.common.devices import PRECISIONS, keep_freed_memory, pick_device
from controlnet.common.images import Size, save_png, to_uint8
from controlnet.common.program import note
from controlnet.guidance import Control, acting_timesteps
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import identify
from ldm.embeddings import with_embeddings
from ldm.fast.packed import pack
from ldm.samplers import check_eta, timesteps_for
from ldm.schedule import Schedule
from ldm.stable_diffusion import StableDiffusion
from ldm.text_encoder import layers_to_run
from ldm.tokenizer import Tokenizer

from .again import with_recorded
from .extras import Extras, find_extras
from .generate import at_size, check_cfg, check_seeds, default_cfg, generate
from .image_to_image import Init, steps_done
from .inputs import CheckedHint, hint_runs, load_controls, read_inputs
from .options import RECORDED, HintOptions, Options, check_pairs
from .png_text import fingerprints, png_texts
from .prompts import chunks_of, cut_texts
from .saving import check_out, save_image

__all__ = ["load", "make_images", "prepare", "save", "with_recorded"]

SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


@dataclass(frozen=True)
class Job:
    """The images of one hint, or of several that act together, checked. No weights are read yet."""

    options: Options
    size: Size
    cfg: float
    device: torch.device
    init: Init | None
    hints: list[CheckedHint]
    steps: int  # that are done, and not left out by image-to-image
    files: dict[str, str]  # fingerprints, by the names given
    extras: Extras
    controls: tuple[Control, ...] = ()  # when the weights are loaded

    def settings(self, seed: int) -> dict:
        """All that makes the image with this seed again (png_text.py)."""
        settings = {name: getattr(self.options, name) for name in RECORDED}
        for item in fields(HintOptions):
            settings[item.name] = [getattr(hint.options, item.name) for hint in self.hints]
        size, strength = "{1}x{0}".format(*self.size), self.init.strength if self.init else None
        settings |= {"size": size, "strength": strength, "cfg": self.cfg, "device": str(self.device)}
        return {**settings, "seed": seed, "files": self.files}


def prepare(options: Options, recorded_files: dict[str, str]) -> list[Job]:
    """Raises ValueError for all that can be wrong and is quick to see, CheckpointError for files that do not fit."""
    if options.seed == -1:
        options = replace(options, seed=secrets.randbelow(2**32))
        note(f"the seed is {options.seed}")
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
    extras = find_extras(options, config, recorded_files)
    check_prompts(options, extras.tokenizer(config.text))

    def job(options: Options) -> Job:
        size, init, hints = read_inputs(options, config, device)
        steps = steps_done(init.strength, len(timesteps)) if init else len(timesteps)
        note_idle_hints(hints, steps)
        used = {
            options.base: base,
            **extras.files,
            **{name: Path(name) for name in (options.init, options.mask) if name},
        }
        for hint in hints:
            used |= hint.files()
        return Job(options, size, cfg, device, init, hints, steps, fingerprints(used, recorded_files), extras)

    return [job(one) for one in hint_runs(options)]


def load(jobs: list[Job]) -> tuple[StableDiffusion, list[Job]]:
    """The base, and the jobs with their controls, packed for the CPU.

    Raises CheckpointError for a ControlNet that does not fit.
    """
    options, device = jobs[0].options, jobs[0].device
    if not options.low_memory:
        keep_freed_memory(device, large=False)
    home = "cpu" if options.low_memory else device
    extras, dtype = jobs[0].extras, PRECISIONS[options.dtype]
    sd = StableDiffusion.load(options.base, home, dtype, options.prediction, loras=extras.loras)
    sd = with_embeddings(sd, extras.embeddings)
    controls = iter(load_controls([hint for job in jobs for hint in job.hints], sd))
    jobs = [
        replace(job, controls=tuple(at_size(next(controls), job.size, job.init) for _ in job.hints)) for job in jobs
    ]
    if not options.low_memory:  # which moves networks about, and needs plain weights for the tiled VAE
        pack(sd.unet, sd.vae, *{control.net for job in jobs for control in job.controls})
    return sd, jobs


def make_images(jobs: list[Job], sd: StableDiffusion) -> Iterator[tuple[Job, int, Image.Image]]:
    """Each with its job and its number among the images of it."""
    with progress(sum(job.options.count * job.steps for job in jobs)) as step:
        for job in jobs:
            options = job.options
            for i in range(options.count):
                (image,) = generate(
                    sd,
                    options.prompt,
                    job.controls,
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
                    callback=lambda progress: step(),
                )
                yield job, i, image


def save(job: Job, i: int, image: Image.Image) -> None:
    """Image i, with all that makes it again; its path is printed. Beside the first are the hints, if asked for.

    Raises ValueError if it cannot be written.
    """
    options = job.options
    path = save_image(image, options.out, i, options.count, png_texts(job.settings(options.seed + i)))
    tqdm.write(str(path))
    if i == 0 and options.save_hint:
        save_hints(job.controls, path)


def save_hints(controls: tuple[Control, ...], image: Path) -> None:
    """As the model sees them: 0001-hint.png for 0001.png, with more than one hint 0001-hint-1.png and so on."""
    for i, control in enumerate(controls):
        path = image.with_name(f"{image.stem}-hint{f'-{i + 1}' if len(controls) > 1 else ''}.png")
        save_png(Image.fromarray(to_uint8(control.hint[0].expand(3, -1, -1))), path, {})  # also of one channel
        tqdm.write(f"the hint is saved as {path}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------- what is said


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """-> what is called after each step: a bar on a terminal, and now and then a line in a file or a pipe."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit="step") as bar:
            yield bar.update
        return
    done, begun = 0, time.monotonic()
    said = begun

    def step() -> None:
        nonlocal done, said
        done, now = done + 1, time.monotonic()
        if done < total and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            note(f"step {done} of {total}, about {(now - begun) / done * (total - done) / 60:.1f} minutes left")

    yield step


def note_idle_hints(hints: list[CheckedHint], steps: int) -> None:
    for hint in hints:
        start, end = hint.options.control_start, hint.options.control_end
        if not acting_timesteps(range(steps), start, end):
            note(f'"{hint.options.hint}" acts in none of the {steps} steps, from {start} to {end} of them')


def check_prompts(options: Options, tokenizer: Tokenizer) -> None:
    """What the text encoder does not read has no effect: it is said. Raises ValueError for prompts without end."""
    for prompt in (options.prompt, options.negative):
        chunks_of(tokenizer, prompt, options.long_prompts)
        for text in () if options.long_prompts else cut_texts(tokenizer, prompt):
            note(f'the prompt is too long, its end is ignored: "{text}" (--long-prompts reads it)')
