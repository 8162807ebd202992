"""Completes the settings that a command line gives: by those of the run to resume, and by what fits the base."""

import math
from dataclasses import replace
from pathlib import Path

from controlnet.ablations import BASELINES
from controlnet.common.devices import optional
from controlnet.common.program import from_json, note
from controlnet.config import ControlConfig
from controlnet.worlds import WORLDS
from ldm.checkpoints.published import find
from ldm.checkpoints.recognise import BaseFile, open_base
from ldm.checkpoints.stored import CheckpointError
from ldm.config import PRESETS, Config

from .data import training_size
from .distributed import launch, launched_processes, started_again
from .lr_schedules import lr_schedule_of
from .opening import open_sources
from .options import FULL_SIZE, LAPTOP, TrainSettings
from .recipes import settings_of
from .run_state import RunFolder


def resolve(given: dict) -> TrainSettings:
    """Raises ValueError if settings contradict each other, the base cannot be used, or there is no run to resume.

    A run that torchrun has started again goes on from its last state without --resume.
    """
    settings = TrainSettings(**given)
    if settings.steps and settings.epochs:
        raise ValueError("--steps and --epochs both say how long to train: leave out one")
    run = RunFolder(settings.out)
    if started_again() and run.was_begun_by(launch()):
        settings = replace(settings, resume=True)
    if settings.resume:
        before = from_json(TrainSettings, run.written()["settings"], str(run.settings_file))
        run.check_fixed(given, before)
        settings = continued(before, given)
    check_together(settings)
    for package in settings.log:
        optional(package, f"--log {package}")
    _, config = open_base_of(settings)
    if not settings.resume:
        settings = replace(settings, **settings_of(settings.recipe, given, min(training_size(settings.size, config))))
    in_epochs = settings.epochs and settings.steps is None
    settings = with_defaults(settings, config)
    if in_epochs:
        settings = replace(settings, steps=steps_of_epochs(settings, config, *run.reached()))
    if settings.resume:
        note_rising_rate(run, with_defaults(TrainSettings(**before), config), settings)
    if settings.shard and settings.optimizer != "adamw":
        raise ValueError(
            f"--shard is for adamw, and the optimizer is {settings.optimizer}: say --optimizer adamw, or leave out "
            "--shard"
        )
    return settings


def continued(before: dict, given: dict) -> TrainSettings:
    """The settings of a run that goes on, with what is given now in place of what it had before."""
    settings = TrainSettings(**{**before, **given, "resume": True})
    if "steps" in given:
        settings = replace(settings, epochs=None)
    elif settings.epochs:  # the steps that are left depend on how large the epochs are by now
        settings = replace(settings, steps=None)
    if settings.buckets and settings.batch_size != before.get("batch_size"):
        raise ValueError(
            "with --buckets each batch has one size, and the run was started with --batch-size "
            f"{before.get('batch_size')}"
        )
    return settings


def check_together(settings: TrainSettings) -> None:
    """Raises ValueError for settings that contradict each other, and for a seed that PyTorch does not take."""
    if not settings.resume and settings.out.resolve() == Path(settings.data).resolve():
        raise ValueError(
            f'--out is the folder of --data, "{settings.data}", and the pictures of the run would become a part of '
            "them: give another folder as --out"
        )
    if settings.seed >= 2**64:
        raise ValueError(f"--seed is {settings.seed}, expected less than 2^64: PyTorch's generators take no larger one")
    if settings.fit and not settings.dry_run:
        raise ValueError("--fit only tells which batch size fits: add --dry-run, then train with that --batch-size")
    if settings.ema and settings.sd_unlocked:
        raise ValueError("--ema averages the copy alone, and --sd-unlocked trains the decoder with it: leave out one")
    if settings.control is not None and settings.architecture != "full":
        raise ValueError("--control brings its own architecture: leave out --architecture, or start without --control")
    if settings.only_mid_control and settings.architecture == "concat":
        raise ValueError("with --architecture concat no block is controlled by itself: leave out --only-mid-control")


def steps_of_epochs(settings: TrainSettings, config: Config, done: int, seen: int) -> int:
    """After how many steps all processes together have seen the epochs' samples: those that are `done` count, in which
    they have `seen` some, perhaps in smaller batches or fewer processes."""
    if settings.no_cache and settings.data in WORLDS and settings.images is None:
        raise ValueError(f"{settings.data} is drawn without end, and has no epochs: say --images N, or --steps")
    pairs = len(open_sources(settings, training_size(settings.size, config)).train)
    per_step = settings.batch_size * settings.accumulate * launched_processes()
    left = settings.epochs * pairs - seen
    return done + max(math.ceil(left / per_step), 0)


def note_rising_rate(run: RunFolder, before: TrainSettings, now: TrainSettings) -> None:
    """A schedule over more steps than before is higher where the run goes on, which must not be silent."""
    if run.states() and now.lr == before.lr:
        step = int(run.states()[-1].stem)
        last, following = (settings.lr * lr_schedule_of(settings)(step) for settings in (before, now))
        if following > last:
            note(
                f"the learning rate rises at step {step} from {last:.1e} to {following:.1e}: {now.lr_schedule} takes "
                f"{now.steps} steps now, where {before.lr_schedule} took {before.steps} (a lower --lr makes it less)"
            )


def with_defaults(settings: TrainSettings, config: Config) -> TrainSettings:
    defaults = LAPTOP if config.name == "tiny" else FULL_SIZE
    return replace(settings, **{name: value for name, value in defaults.items() if getattr(settings, name) is None})


def open_base_of(settings: TrainSettings) -> tuple[BaseFile | None, Config]:
    """The base and its architecture, from its header alone; of a preset that is still to be downloaded there is no
    file.

    Raises CheckpointError for an inpainting model: a ControlNet does not see the mask.
    """
    base = None
    try:
        find(settings.base)
    except CheckpointError:
        if settings.base not in PRESETS:
            raise
    else:
        base = open_base(settings.base, settings.prediction, settings.zero_snr, settings.vae)
    config = base.config if base else PRESETS[settings.base]
    if config.unet.inpainting:
        raise CheckpointError(
            f'"{settings.base}" is an inpainting model, on which ControlNets are not trained: train on the base that '
            "it was made from, like sd15, and use the result with both"
        )
    return base, config


def control_config(settings: TrainSettings) -> ControlConfig:
    """The configuration of a fresh ControlNet. Those that are not baselines are full copies that start differently."""
    built_otherwise = settings.architecture in BASELINES
    return ControlConfig(
        settings.hint_channels,
        global_average_pooling=settings.global_average_pooling,
        architecture=settings.architecture if built_otherwise else "full",
    )


def check_hint_channels(config: ControlConfig, settings: TrainSettings) -> None:
    """Raises ValueError if --control reads hints of other channels."""
    if config.hint_channels != settings.hint_channels:
        raise ValueError(
            f"{settings.control} reads hints of {config.hint_channels} channels, expected {settings.hint_channels}: "
            f"say --hint-channels {config.hint_channels}"
        )
