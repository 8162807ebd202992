"""What train.py would do with its settings, told without doing it."""

from collections.abc import Callable
from dataclasses import replace

from controlnet.checkpoint import find_control
from controlnet.common.devices import pick_device
from controlnet.config import ControlConfig
from controlnet.inference.sizes import size_multiple
from controlnet.layouts import check_family, recognise_control
from controlnet.model import ControlNet
from ldm.checkpoints.load import IGNORED_BESIDE_BASE, check_keys, warn_of_left_out, without_weights
from ldm.checkpoints.lora import check_loras
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.recognise import BaseFile
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion

from .data import training_size
from .disk import disk_plan
from .distributed import launched_processes
from .framing import framing
from .latent_cache import card_of
from .memory import Prediction, table
from .opening import open_sources
from .options import TrainSettings
from .previews import own_samples
from .resolve import check_hint_channels, control_config, open_base_of
from .run_state import RunFolder
from .sources import BadSamples, FolderSource


def plan(settings: TrainSettings) -> str:
    """What would be trained, on how many images, in how much memory and on how much disk. Only the headers of base,
    control and most images are read, and a preset's file need not be there.

    Raises ValueError for what cannot be trained.
    """
    base, config = open_base_of(settings)
    control = check_networks(settings, base, config)
    size = training_size(settings.size, config)
    multiple = size_multiple(config)
    sources = open_sources(settings, size, multiple)
    own_samples(settings, size)
    unusable = sources.train.problems() if isinstance(sources.train, FolderSource) else []
    pairs, problems = len(sources.train) - len(unusable), sources.problems + unusable
    BadSamples(pairs, problems, settings.bad_share)  # which refuses too many
    if not settings.resume:
        RunFolder(settings.out).check_new()
    if not settings.no_cache:
        card_of(settings.cache_folder)
    device = pick_device(settings.device)

    def predict(settings: TrainSettings) -> Prediction:
        return Prediction(config, settings, size, control, device, launched_processes(), len(sources.validation))

    prediction = predict(settings)
    memory = prediction(settings.batch_size)
    samples = settings.steps * settings.accumulate * settings.batch_size * launched_processes()
    epochs = samples / max(pairs, 1)
    unused = f"{len(problems)} pairs cannot be used: {', '.join(problems[:3])}" if problems else ""
    lines = [
        sources.about,
        f"{config.name}: {memory.trained / 1e6:.1f} million parameters (fp32) are trained in {settings.precision}",
        f"{pairs} pairs of {size[1]}x{size[0]} pixels, {samples} samples seen ({epochs:.1f} epochs)",
        unused,
        *framing(sources.train, multiple),
        f"{settings.steps} optimizer steps of {settings.accumulate} x {settings.batch_size}, per process",
        f"memory of a process on {device.type}:",
        table(memory),
        *(fitting_batches(settings, predict) if settings.fit else []),
        disk_plan(config, settings, sources.train, prediction),
    ]
    return "\n".join(filter(None, lines))


def fitting_batches(settings: TrainSettings, predict: Callable[[TrainSettings], Prediction]) -> list[str]:
    """The largest batch size that fits into --fit, and with gradient checkpointing if that is off: a line each."""
    lines = []
    for checkpointing in sorted({settings.checkpointing, True}):
        prediction = predict(replace(settings, checkpointing=checkpointing))
        batch_size, memory = prediction.largest_batch(settings.fit * 1e9)
        what = " --checkpointing" if checkpointing else ""
        if batch_size:
            lines.append(f"{settings.fit:g} GB hold --batch-size {batch_size}{what} ({memory.most / 1e9:.2f} GB)")
        else:
            lines.append(
                f"{settings.fit:g} GB do not hold --batch-size 1{what}, which needs {memory.most / 1e9:.2f} GB: "
                f"{savings(settings)}"
            )
    return lines


def savings(settings: TrainSettings) -> str:
    """The ways to need less memory that are not taken yet."""
    advice = {
        "leave out --sd-unlocked": settings.sd_unlocked,
        "leave out --no-cache": settings.no_cache,
        "leave out --ema": settings.ema is not None,
        "leave out --accumulate": settings.accumulate > 1,
        "add --precision fp16": settings.precision in ("fp32", "tf32"),
        "add --optimizer adamw8bit": settings.optimizer != "adamw8bit",
    }
    return ", ".join([*(words for words, helps in advice.items() if helps), "or give a smaller --size"])


def check_networks(settings: TrainSettings, base: BaseFile | None, config: Config) -> ControlConfig:
    """Base, LoRAs and control, with the warnings of loading them -> the control's configuration."""
    if base:
        base.warn()
        with without_weights():
            parts = StableDiffusion(base.config).parts_in(base.checkpoint)
        warn_of_left_out(base.checkpoint, check_keys(base.checkpoint, parts, IGNORED_BESIDE_BASE))
    check_loras(settings.lora, config)
    if settings.control is None:
        return control_config(settings)
    checkpoint = open_checkpoint(find_control(settings.control, config.unet))
    found = recognise_control(checkpoint)
    check_family(checkpoint, found, config.unet)
    check_hint_channels(found.config, settings)
    warn_of_left_out(checkpoint, ControlNet.check(checkpoint, found, config.unet))
    return found.config
