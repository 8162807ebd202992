"""One run of infer.py: check everything, load the networks, make the images batch by batch."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from controlnet.common.devices import PRECISIONS, keep_freed_memory, lay_out, use_device, use_precision
from controlnet.common.images import Size
from controlnet.common.program import note
from controlnet.guidance import Control, acting_steps
from controlnet.model import ControlNet
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import open_base
from ldm.checkpoints.stored import first_few
from ldm.config import Config
from ldm.embeddings import with_embeddings
from ldm.fast.packed import pack
from ldm.samplers import check_eta, timesteps_for
from ldm.schedule import Schedule
from ldm.stable_diffusion import StableDiffusion
from ldm.text_encoder import layers_to_run
from ldm.tokenizer import Tokenizer

from .again import with_recorded
from .extras import Extras, find_extras
from .generate import generate
from .image_to_image import Init
from .inputs import CheckedHint, hint_runs, net_loader, read_inputs, read_start, steps_of
from .memory import Plan, default_batch_size
from .options import RECORDED, HintOptions, Options, check_together
from .png_text import check_unchanged, fingerprint, png_texts
from .predictors import check_compile
from .progress import Progress, shown
from .prompts import NOT_READ, chunks_of, cut_texts
from .saving import check_out, is_file_name, save_hints, save_image, saving
from .sizes import SEEDS, check_cfg, check_seeds, default_cfg
from .upscale import larger_size, upscaled

__all__ = ["load", "make_images", "prepare", "save", "with_recorded"]


@dataclass(frozen=True)
class Job:
    """The images of one hint, or of several that act together, checked. No weights are read yet."""

    options: Options
    size: Size
    cfg: float
    device: torch.device
    init: Init | None
    hints: list[CheckedHint]
    steps: int  # of each image, with those of the second pass and without those that image-to-image leaves out
    files: dict[str, str]  # fingerprints, by the names given
    extras: Extras
    controls: tuple[Control, ...] = ()  # once the weights are loaded
    large_controls: tuple[Control, ...] = ()  # of the second pass, at its size
    batch_size: int = 1

    def batches(self) -> Iterator[range]:
        """The numbers of the images that are made at once."""
        images = range(self.options.count)
        return (images[first : first + self.batch_size] for first in images[:: self.batch_size])

    @property
    def cpu_offload(self) -> torch.device | None:
        """The argument of `generate`."""
        return self.device if self.options.low_memory else None

    def settings(self, i: int) -> dict:
        """All that it takes to make image i again (png_text.py)."""
        settings = {name: getattr(self.options, name) for name in RECORDED}
        for item in fields(HintOptions):
            settings[item.name] = [getattr(hint.options, item.name) for hint in self.hints]
        size, strength = "{1}x{0}".format(*self.size), self.init.strength if self.init else None
        settings |= {"size": size, "strength": strength, "cfg": self.cfg, "device": str(self.device)}
        settings |= {"seed": self.options.seed + i, "batch_size": next(len(b) for b in self.batches() if i in b)}
        return {**settings, "files": self.files}


def prepare(options: Options, recorded_files: dict[str, str], held: int = 0) -> list[Job]:
    """-> a job for each image of a --hint that is a folder or a pattern, else one. `recorded_files` come from
    `with_recorded`; `held` are the bytes of a base that the page has in memory, and will use or free.

    Raises ValueError for everything wrong that is quick to find, CheckpointError for files that do not fit.
    """
    if options.seed == -1:
        options = replace(options, seed=secrets.randbelow(max(1, SEEDS - options.count)))
        note(f"the seed is {options.seed}")
    base = open_base(options.base, options.prediction, options.zero_snr, options.vae)
    config = base.config
    cfg, steps = checked_numbers(options, config)
    device = use_device(options.device)
    options = replace(options, precision=use_precision(options.precision or default_precision(device), device))
    check_out(options.out)
    check_together(options)
    extras = find_extras(options, config, recorded_files)
    check_prompts(options, extras.tokenizer(config.text))
    if options.compile:
        check_compile(options.reuse, options.low_memory)
    if options.again and (options.batch_size or 1) > options.count:
        note(f'"{options.again}" is made alone, not in a batch of {options.batch_size}: it is the same to rounding')

    runs = hint_runs(options)
    if len(runs) > 1 and is_file_name(options.out):
        raise ValueError(f'there are {len(runs)} hints, and --out "{options.out}" is one file: give a folder')
    mask, init = read_start(options, config)
    first_pass = steps_of("--strength", init.strength, steps) if init else steps
    second_pass = steps_of("--upscale-strength", options.upscale_strength, steps) if options.upscale != 1 else 0
    fingerprint_of = cache(fingerprint)

    def job(options: Options) -> Job:
        size, hints = read_inputs(options, config, device, mask, init, held)
        note_idle_hints(hints, first_pass, second_pass)
        used = {options.base: base.checkpoint.path} | used_files(options, hints, extras)
        files = {name: fingerprint_of(path) for name, path in used.items()}
        check_unchanged(files, recorded_files)
        return Job(options, size, cfg, device, init, hints, first_pass + second_pass, files, extras)

    return [job(one) for one in runs]


def checked_numbers(options: Options, config: Config) -> tuple[float, int]:
    """-> the guidance scale and the number of steps. Raises ValueError for numbers out of their ranges."""
    steps = len(timesteps_for(options.sampler, Schedule(config.schedule), options.steps))
    cfg = default_cfg(config) if options.cfg is None else options.cfg
    check_cfg(cfg)
    check_eta(options.sampler, options.eta)
    check_seeds(options.seed, options.count)
    layers_to_run(config.text, options.clip_skip)
    return cfg, steps


def used_files(options: Options, hints: list[CheckedHint], extras: Extras) -> dict[str, Path]:
    """All files but the base's, by the names given."""
    used = {name: Path(name) for name in (options.init, options.mask) if name} | extras.files
    if options.vae:
        used[options.vae] = find(options.vae)[0]
    for hint in hints:
        used |= hint.files()
    return used


def default_precision(device: torch.device) -> str:
    """fp16 on CUDA, as published pipelines run there (all networks, the text encoder too), and a note that says so."""
    if device.type != "cuda":
        return "fp32"
    note("computing in fp16 (--precision fp32: slower and exact)")
    return "fp16"


def load(jobs: list[Job]) -> tuple[StableDiffusion, list[Job]]:
    """The base, and the jobs with their controls, packed for the CPU or laid out for CUDA.

    Raises CheckpointError for a ControlNet that does not fit.
    """
    sd = load_base(jobs[0])
    return sd, load_jobs(jobs, sd)


def load_base(job: Job) -> StableDiffusion:
    options, device, extras = job.options, job.device, job.extras
    if not options.low_memory:
        keep_freed_memory(device, large=False)
    home = "cpu" if options.low_memory else device
    described = dict(prediction=options.prediction, zero_snr=options.zero_snr, vae=options.vae, loras=extras.loras)
    sd = StableDiffusion.load(options.base, home, PRECISIONS[options.precision], **described)
    return with_embeddings(sd, extras.embeddings)


def load_jobs(jobs: list[Job], sd: StableDiffusion) -> list[Job]:
    """The jobs with their controls. `sd` is packed or laid out, too; it may have been before."""
    options, load_net = jobs[0].options, net_loader(sd)
    jobs = [with_controls(job, load_net, sd) for job in jobs]
    networks = [sd.unet, *{control.net for job in jobs for control in job.controls}]
    lay_out(networks, jobs[0].device, options.precision)
    if not options.low_memory:  # which moves networks about, and needs plain weights for the tiled VAE
        pack(sd.vae, *(() if options.compile else networks))
    return jobs


def with_controls(job: Job, load_net: Callable[[CheckedHint], ControlNet], sd: StableDiffusion) -> Job:
    """The job with its controls, and with as many images at once as then fit in memory, unless that is given."""

    def at(size: Size) -> tuple[Control, ...]:
        return tuple(hint.control(load_net(hint), size) for hint in job.hints)

    options, controls = job.options, at(job.size)
    large = () if options.upscale == 1 else at(larger_size(sd.config, job.size, options.upscale))
    plan = Plan(sd.config, job.size, sd.dtype, len(controls), options.low_memory, options.tile_diffusion)
    batch_size = options.batch_size or default_batch_size(plan, options.count, job.device)
    return replace(job, controls=controls, large_controls=large, batch_size=batch_size)


def make_images(
    jobs: list[Job], sd: StableDiffusion, watch: Callable[[Progress], None] | None = None
) -> Iterator[tuple[Job, int, Image.Image]]:
    """Each image, with its job and its number in that job. `watch` is called after each step."""
    with shown(sum(job.options.count * job.steps for job in jobs)) as step:

        def told(done: Progress) -> None:
            step()
            if watch:
                watch(done)

        for job in jobs:
            for batch in job.batches():
                images = make_batch(job, batch, sd, told)
                yield from ((job, i, image) for i, image in zip(batch, images, strict=True))


def make_batch(job: Job, batch: range, sd: StableDiffusion, callback: Callable) -> list[Image.Image]:
    options = job.options
    settings = dict(
        negative=options.negative,
        steps=options.steps,
        sampler=options.sampler,
        cfg=job.cfg,
        eta=options.eta,
        seed=options.seed + batch[0],
        clip_skip=options.clip_skip,
        long_prompts=options.long_prompts,
        reuse=options.reuse,
        compile=options.compile,
        cpu_offload=job.cpu_offload,
        tile_diffusion=options.tile_diffusion,
        callback=callback,
    )
    first = dict(count=len(batch), batch_size=job.batch_size, size=job.size, init=job.init)
    images = generate(sd, options.prompt, job.controls, **first, **settings)
    if options.upscale == 1:
        return images
    strength = options.upscale_strength
    return upscaled(sd, images, options.upscale, options.prompt, job.large_controls, strength=strength, **settings)


def save(job: Job, i: int, image: Image.Image) -> None:
    """Saves image i with its settings, and beside the first the hints, if asked for; prints the paths.

    Raises ValueError if they cannot be written.
    """
    options = job.options
    path = save_image(image, options.out, i, options.count, png_texts(job.settings(i)))
    tqdm.write(str(path))
    if i == 0 and options.save_hint:
        with saving(options.out):
            save_hints(job.controls, path)


# --------------------------------------------------------------------------------------------------------- what is said


def note_idle_hints(hints: list[CheckedHint], *passes: int) -> None:
    for hint in hints:
        start, end = hint.options.control_start, hint.options.control_end
        if not any(acting_steps(steps, start, end) for steps in passes):
            note(f'"{hint.options.hint}" acts in none of the {sum(passes)} steps, from {start} to {end} of them')


def check_prompts(options: Options, tokenizer: Tokenizer) -> None:
    """Notes what is cut from the prompts or read as words. Raises ValueError for prompts that are much too long."""
    for prompt in (options.prompt, options.negative):
        chunks_of(tokenizer, prompt, options.long_prompts)
        if found := NOT_READ.findall(prompt):
            note(f"read as words, not as instructions, in a prompt: {first_few(dict.fromkeys(found), 20)}")
        for text in () if options.long_prompts else cut_texts(tokenizer, prompt):
            note(f'the prompt is too long, its end is ignored: "{text}" (--long-prompts reads it)')
