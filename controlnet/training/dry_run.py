"""What train.py would do with its settings, told without doing it."""

from .data import image_size
from .memory import predict, table
from .options import TrainSettings
from .resolve import config_of
from .sources import open_sources


def plan(settings: TrainSettings) -> str:
    """What would be trained, on how many images, and in how much memory. Of the base no more than its header is read,
    and a preset's file need not be there."""
    config = config_of(settings.base, settings.prediction)
    size = image_size(settings.size, config)
    pairs = len(open_sources(settings, size).train)
    memory, samples = predict(config, settings, size), settings.steps * settings.batch_size * settings.accumulate
    return "\n".join(
        [
            f"{config.name}: {memory.trained / 1e6:.1f} million parameters are trained, in {settings.precision}",
            f"{pairs} pairs of {size[1]}x{size[0]} pixels, {samples} samples seen ({samples / pairs:.1f} epochs)",
            f"{settings.steps} optimizer steps of {settings.accumulate} x {settings.batch_size}, a process",
            table(memory),
        ]
    )
