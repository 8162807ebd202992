"""What train.py would do with its settings, told without doing it."""

from controlnet.checkpoint import find_control
from controlnet.config import ControlConfig
from controlnet.layouts import IGNORED_BESIDE_CONTROL, check_family, recognise_control
from controlnet.model import ControlNet
from ldm.checkpoints.load import IGNORED_BESIDE_BASE, check_keys, warn_of_left_out, without_weights
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.recognise import BaseFile
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet

from .data import image_size
from .memory import predict, table
from .options import TrainSettings
from .resolve import check_hint_channels, config_of, control_config, open_base_of
from .sources import BadSamples, open_sources


def plan(settings: TrainSettings) -> str:
    """What would be trained, on how many images, and in how much memory. Of base and control no more than the header is
    read, of images that they are there, and a preset's file need not be.

    Raises ValueError for what cannot be trained.
    """
    config = config_of(settings)
    if base := open_base_of(settings):
        check_base(base)
    control = check_control(settings, config) if settings.control else control_config(settings)
    size = image_size(settings.size, config)
    sources = open_sources(settings, size)
    missing = [f'"{file}" does not exist' for file in sources.train.missing()]
    pairs, problems = len(sources.train) - len(missing), sources.problems + missing
    BadSamples(pairs, problems, settings.bad_share)
    memory, samples = (
        predict(config, settings, size, control),
        settings.steps * settings.batch_size * settings.accumulate,
    )
    epochs = samples / max(pairs, 1)
    return "\n".join(
        [
            f"{config.name}: {memory.trained / 1e6:.1f} million parameters (fp32) are trained in {settings.precision}",
            f"{pairs} pairs of {size[1]}x{size[0]} pixels, {samples} samples seen ({epochs:.1f} epochs)",
            *([f"{len(problems)} pairs cannot be used: {', '.join(problems[:3])}"] if problems else []),
            f"{settings.steps} optimizer steps of {settings.accumulate} x {settings.batch_size}, a process",
            table(memory),
        ]
    )


def check_base(base: BaseFile) -> None:
    """With the warnings of loading it."""
    base.warn()
    with without_weights():
        sd = StableDiffusion(base.config)
    warn_of_left_out(base.checkpoint, check_keys(base.checkpoint, sd.parts_in(base.checkpoint), IGNORED_BESIDE_BASE))


def check_control(settings: TrainSettings, config: Config) -> ControlConfig:
    checkpoint = open_checkpoint(find_control(settings.control, config.unet))
    found = recognise_control(checkpoint)
    check_family(checkpoint, found, config.unet)
    check_hint_channels(found.config, settings)
    with without_weights():
        control = ControlNet(UNet(config.unet), found.config)
    parts = [(control, found.key_map(config.unet))]
    warn_of_left_out(checkpoint, check_keys(checkpoint, parts, IGNORED_BESIDE_CONTROL))
    return found.config
