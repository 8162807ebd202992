"""The options of train.py, which --help explains without PyTorch."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """The settings, by the names of their options, that depend on the base where nobody gives them."""

    optimizer: str
    lr: float
    rate: str
    batch_size: int
    steps: int
    sample_every: int


# The authors' own for SD (docs/train.md), and for the small base what converges within minutes.
PAPER = Recipe("adamw", lr=1e-5, rate="constant", batch_size=4, steps=10000, sample_every=250)
LAPTOP = Recipe("muon", lr=1e-3, rate="cosine", batch_size=16, steps=1000, sample_every=50)


def by_base(name: str) -> str:
    """For --help: the default of an option that is part of the recipes."""
    return f"(default: {getattr(LAPTOP, name)} for tiny, {getattr(PAPER, name)} for SD)"


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        usage="python train.py [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    add_data(parser.add_argument_group("data"))
    add_method(parser.add_argument_group("method"))
    add_machine(parser.add_argument_group("machine"))
    add_run(parser.add_argument_group("run"))
    return parser


def settled(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """The settings as they count: with --resume, what is not given is as it was.

    Raises ValueError for contradictions, for a base that is none, and rather than write over another run.
    """
    from controlnet.common.devices import optional  # these need PyTorch

    from .dry_run import config_of
    from .run_state import RunFolder

    run = RunFolder(args.out)
    if args.resume:
        parser.set_defaults(**run.written()["settings"])
        args = parser.parse_args(argv)
        run.check_same(vars(args))
    elif not args.dry_run:
        run.check_new()
    if args.tensorboard:
        optional("tensorboard", "--tensorboard")
    if args.ema and args.sd_unlocked:
        raise ValueError("--ema averages the copy alone, and --sd-unlocked trains the decoder with it: leave out one")
    if args.control and args.architecture != "full":
        raise ValueError("--control brings its own architecture: leave out --architecture, or start without --control")
    recipe = LAPTOP if config_of(args.base, args.prediction).name == "tiny" else PAPER
    for name, value in asdict(recipe).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def add_data(data) -> None:
    data.add_argument(
        "--data",
        default="fill50k",
        metavar="NAME",
        help="a folder of pairs (prompt.json, metadata.jsonl, or images/ hints/ captions/), or a world that draws "
        "them: fill50k, people, shapes, edges (default: %(default)s: data/fill50k if the published set lies there)",
    )
    data.add_argument("--pictures", type=positive, metavar="N", help="use the first N (default: all; of a world 2000)")
    data.add_argument("--size", type=size_argument, metavar="N|WxH", help="in pixels (default: the base's own)")
    data.add_argument(
        "--detect", metavar="NAME", help="make the hints from the pictures: canny, canny:low=50, tile ..."
    )
    data.add_argument("--hint-channels", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    data.add_argument("--random-crop", action="store_true", help="another part of the picture each time (--no-cache)")
    data.add_argument("--flip", action="store_true", help="mirror half of the pairs (--no-cache)")
    data.add_argument(
        "--held-out", type=count, metavar="N", help="pairs not to train on (default: 1 in 20, at most 32)"
    )
    data.add_argument(
        "--prompt-dropout", type=share, default=0.5, metavar="P", help="share of empty prompts (default: %(default)s)"
    )
    data.add_argument(
        "--bad-share", type=share, default=0.01, metavar="P", help="of bad samples, skipped (default: %(default)s)"
    )
    data.add_argument("--cache", type=Path, metavar="DIR", help="of the latents, to share it (default: OUT/cache)")
    data.add_argument("--no-cache", action="store_true", help="encode at each step; worlds are then endless")
    data.add_argument("--workers", type=count, metavar="N", help="processes that read (default: 0, with CUDA 4)")


def add_method(method) -> None:
    method.add_argument(
        "--base",
        default="tiny",
        metavar="FILE",
        help="the locked model: a file, or tiny, sd15, sd21 (default: %(default)s)",
    )
    method.add_argument("--prediction", choices=["eps", "v"], help="of an SD 2.x base whose file does not tell")
    method.add_argument("--control", metavar="FILE", help="start from this ControlNet, not from a fresh copy")
    method.add_argument(
        "--architecture",
        choices=["full", "lite", "gaussian"],
        default="full",
        help="lite: single convolutions, not a copy; gaussian: no zero convolutions. The paper's ablations",
    )
    method.add_argument("--steps", type=positive, metavar="N", help=f"optimiser steps {by_base('steps')}")
    method.add_argument("--batch-size", type=positive, metavar="N", help=f"pictures at once {by_base('batch_size')}")
    method.add_argument(
        "--accumulate", type=positive, default=1, metavar="N", help="batches a step (default: %(default)s)"
    )
    method.add_argument(
        "--optimizer",
        choices=["adamw", "adamw8bit", "muon"],
        help=f"adamw8bit needs bitsandbytes {by_base('optimizer')}",
    )
    method.add_argument("--lr", type=positive_number, metavar="X", help=f"the learning rate {by_base('lr')}")
    method.add_argument(
        "--warmup", type=count, default=100, metavar="N", help="steps up to the full rate (default: %(default)s)"
    )
    method.add_argument(
        "--rate", choices=["constant", "cosine"], help=f"after the warm-up; cosine ends at 0 {by_base('rate')}"
    )
    method.add_argument(
        "--clip",
        type=positive_number,
        default=1.0,
        metavar="X",
        help="largest norm of the gradients; the published trainer: inf (default: 1)",
    )
    method.add_argument("--ema", type=share, metavar="DECAY", help="save a moving average of the copy, of 0.999, say")
    method.add_argument(
        "--min-snr", type=positive_number, metavar="GAMMA", help="weigh timesteps by min(SNR, GAMMA), usually 5"
    )
    method.add_argument("--sd-unlocked", action="store_true", help="train the base's decoder too")
    method.add_argument("--only-mid-control", action="store_true", help="control the middle block alone")
    method.add_argument(
        "--seed", type=count, default=0, metavar="N", help="of all that is random (default: %(default)s)"
    )


def add_machine(machine) -> None:
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    machine.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="of the computation")
    machine.add_argument("--checkpointing", action="store_true", help="less memory for activations, more time")
    machine.add_argument("--deterministic", action="store_true", help="the same bits each time on CUDA too, slower")
    machine.add_argument("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    machine.add_argument("--dry-run", action="store_true", help="print the plan and the memory it needs, train nothing")


def add_run(run) -> None:
    run.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/control"), help="the run's folder (default: %(default)s)"
    )
    run.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    run.add_argument("--save-dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of control.safetensors")
    run.add_argument(
        "--save-every", type=positive, default=250, metavar="N", help="steps, for the state (default: %(default)s)"
    )
    run.add_argument(
        "--keep", type=positive, default=2, metavar="N", help="states, the newest ones (default: %(default)s)"
    )
    run.add_argument(
        "--check-every",
        type=positive,
        default=50,
        metavar="N",
        help="steps, for the held-out loss (default: %(default)s)",
    )
    run.add_argument(
        "--sample-every",
        type=positive,
        metavar="N",
        help=f"steps, for a grid of pictures {by_base('sample_every')}",
    )
    run.add_argument(
        "--sample-count", type=count, default=8, metavar="N", help="pictures in a grid (default: %(default)s)"
    )
    run.add_argument("--tensorboard", action="store_true", help="log there too (needs tensorboard)")


def positive(text: str) -> int:
    return at_least(1, text)


def count(text: str) -> int:
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f'it is "{text}", expected a whole number from {least} on')
    return int(text)


def positive_number(text: str) -> float:
    return within(text, "a number above 0", lambda number: number > 0)


def share(text: str) -> float:
    return within(text, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def within(text: str, expected: str, good: Callable[[float], bool]) -> float:
    with suppress(ValueError):
        if good(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f'it is "{text}", expected {expected}')


def size_argument(text: str) -> str:
    """512 or 512x768, width first: kept as it is typed, for settings.json."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f'it is "{text}", expected pixels like 512, or width x height like 512x768')
    return text
