"""Merges ControlNets into one whose weights are a weighted sum of theirs.

    python -m tools.merge canny.safetensors hed.safetensors --weights 0.7 0.3 --out lines.safetensors

It costs no more than one of them to run. They should be of one origin (for example two stages of a training, or two
trained on the same base), and of one architecture, which is checked. The sum is made in fp32.
"""

import argparse
import math
import sys
from pathlib import Path

if not __package__:  # for `python tools/merge.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.cli import add_output, check_output, layout_of, new_parser, note, run, written


def main(argv: list[str] | None = None) -> int:
    return run("merge", merge, parse_args(argv))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("merge", __doc__)
    parser.add_argument("controls", nargs="+", metavar="CONTROL", help="two or more, in any layout")
    group = parser.add_argument_group("sum")
    group.add_argument(
        "--weights", nargs="+", type=float, metavar="X", help="one for each CONTROL, used as given (default: the mean)"
    )
    group.add_argument("--base", metavar="BASE", help="to add to those that are stored as a difference to it")
    add_output(parser)
    return parser.parse_args(argv)


def merge(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    weights = check_weights(args.weights, len(args.controls))
    from tools.checkpoints import load_base, load_control, torch_dtype

    base = load_base(args.base).unet if args.base else None
    result = load_control(args.controls[0], base)
    dtypes = [dtype_of(result)]
    result.float()
    for own in result.parameters():
        own.data = own * weights[0]  # a copy: what was loaded may be the file itself
    for name, weight in zip(args.controls[1:], weights[1:], strict=True):
        other = load_control(name, base)
        check_alike(result, other, args.controls[0], name)
        dtypes.append(dtype_of(other))
        for own, theirs in zip(result.parameters(), other.parameters(), strict=True):
            own.data += weight * theirs.float()
    with written(args.out, args.force) as path:
        result.save(path, torch_dtype(args.dtype) or widest(dtypes), layout_of(args.out))


def check_weights(weights: list[float] | None, count: int) -> list[float]:
    """Raises ValueError if there is not one number for each of `count` ControlNets, at least two."""
    if count < 2:
        raise ValueError("there is one ControlNet, expected two or more: convert it with tools.convert")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"--weights has {len(weights)} numbers, expected one finite number for each of {count}")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        note(f"merge: the weights add up to {sum(weights):g}; only with 1 is the mean of two equal ones the same again")
    return weights


def dtype_of(control):
    return next(control.parameters()).dtype


def widest(dtypes: list):
    from functools import reduce

    import torch

    return reduce(torch.promote_types, dtypes)


def check_alike(first, other, first_name: str, other_name: str) -> None:
    """Raises ValueError for two architectures."""
    if (first.encoder.config, first.config) != (other.encoder.config, other.config):
        raise ValueError(
            f'"{other_name}" is of another architecture than "{first_name}" (family, hint channels or pooling): only '
            "ControlNets of one can be added"
        )


if __name__ == "__main__":
    sys.exit(main())
