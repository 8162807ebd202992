"""What train.py would do with its options, told without doing it."""

import argparse

from ldm.checkpoints.checkpoint import open_checkpoint
from ldm.checkpoints.recognise import recognise
from ldm.config import PRESETS, Config
from ldm.stable_diffusion import find

from .memory import Plan, predict, table
from .training_data import DataSettings, open_settings, picture_size


def described(args: argparse.Namespace) -> str:
    """What would be trained, on how many pictures, and in how much memory. Of the base no more than its header is read,
    and a preset's file need not be there."""
    config = config_of(args.base, args.prediction)
    size = picture_size(args.size, config)
    pairs = len(open_settings(DataSettings.from_args(args), size).train)
    plan = Plan(
        size,
        args.batch_size,
        precision=args.precision,
        checkpointing=args.checkpointing,
        cached=not args.no_cache,
        hint_channels=args.hint_channels,
        sd_unlocked=args.sd_unlocked,
        only_mid_control=args.only_mid_control,
        optimizer=args.optimizer,
        ema=args.ema is not None,
        lite=args.architecture == "lite",
    )
    memory, samples = predict(config, plan), args.steps * args.batch_size * args.accumulate
    return "\n".join(
        [
            f"{config.name}: {memory.trained / 1e6:.1f} million parameters are trained, in {args.precision}",
            f"{pairs} pairs of {size[1]}x{size[0]} pixels, {samples} samples seen ({samples / pairs:.1f} epochs)",
            f"{args.steps} optimiser steps of {args.accumulate} x {args.batch_size}, a process",
            table(memory),
        ]
    )


def config_of(base: str, prediction: str | None) -> Config:
    return PRESETS[base] if base in PRESETS else recognise(open_checkpoint(find(base)[0]), prediction).config
