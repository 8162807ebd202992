"""From what a command line gives to the settings of a run: those of the run to resume, and what depends on the base."""

from dataclasses import replace

from controlnet.common.devices import optional
from controlnet.common.program import from_json
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import recognise
from ldm.config import PRESETS, Config

from .options import LAPTOP, PAPER, TrainSettings
from .run_state import RunFolder


def resolve(given: dict) -> TrainSettings:
    """Raises ValueError for contradictions, for a base that is none, and rather than write over another run."""
    settings = TrainSettings(**given)
    run = RunFolder(settings.out)
    if settings.resume:
        before = from_json(TrainSettings, run.written()["settings"], str(run.settings_file))
        run.check_fixed(given, before)
        settings = TrainSettings(**{**before, **given})
    elif not settings.dry_run:
        run.check_new()
    if settings.tensorboard:
        optional("tensorboard", "--tensorboard")
    if settings.ema and settings.sd_unlocked:
        raise ValueError("--ema averages the copy alone, and --sd-unlocked trains the decoder with it: leave out one")
    if settings.control and settings.architecture != "full":
        raise ValueError("--control brings its own architecture: leave out --architecture, or start without --control")
    return with_defaults(settings, config_of(settings.base, settings.prediction))


def with_defaults(settings: TrainSettings, config: Config) -> TrainSettings:
    """What nobody gives and depends on the base."""
    defaults = LAPTOP if config.name == "tiny" else PAPER
    return replace(settings, **{name: value for name, value in defaults.items() if getattr(settings, name) is None})


def config_of(base: str, prediction: str | None) -> Config:
    """A base's architecture from its header alone; a preset's file need not be there."""
    return PRESETS[base] if base in PRESETS else recognise(open_checkpoint(find(base)[0]), prediction).config
