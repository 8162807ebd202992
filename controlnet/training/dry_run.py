"""What train.py would do with its settings, told without doing it."""

from controlnet.checkpoint import find_control
from controlnet.config import ControlConfig
from controlnet.layouts import IGNORED_BESIDE_CONTROL, recognise_control
from controlnet.model import ControlNet
from ldm.checkpoints.load import IGNORED_BESIDE_BASE, check_keys, without_weights
from ldm.checkpoints.lora import check_loras
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import base_layout
from ldm.checkpoints.stored import CheckpointError
from ldm.config import Config
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import UNet

from .data import image_size
from .memory import predict, table
from .options import TrainSettings
from .resolve import check_hint_channels, config_of, control_config
from .sources import BadSamples, open_sources


def plan(settings: TrainSettings) -> str:
    """What would be trained, on how many images, and in how much memory. Of base and control no more than the header is
    read, of images that they are there, and a preset's file need not be.

    Raises ValueError for what cannot be trained.
    """
    config = config_of(settings.base, settings.prediction)
    check_base(settings.base, config)
    check_loras(settings.lora, config)
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


def check_base(base: str, config: Config) -> None:
    try:
        path, _ = find(base)
    except CheckpointError:  # a preset that is still to be downloaded
        return
    checkpoint = open_checkpoint(path)
    with without_weights():
        sd = StableDiffusion(config)
    check_keys(checkpoint, sd.parts(base_layout(checkpoint)), IGNORED_BESIDE_BASE)


def check_control(settings: TrainSettings, config: Config) -> ControlConfig:
    checkpoint = open_checkpoint(find_control(settings.control, config.unet))
    found = recognise_control(checkpoint)
    check_hint_channels(found.config, settings)
    with without_weights():
        control = ControlNet(UNet(config.unet), found.config)
    check_keys(checkpoint, [(control, found.key_map(config.unet))], IGNORED_BESIDE_CONTROL)
    return found.config
