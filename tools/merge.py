"""Merges ControlNets into one whose weights are a weighted sum of theirs.

    python -m tools.merge canny.safetensors hed.safetensors --weights 0.7 0.3 --out lines.safetensors

The result costs no more to run than one of them. They must share an architecture, and should share an origin (two
stages of one training, say, or two trainings on the same base). The sum is computed in fp32.
"""

import argparse
import math
import sys

from controlnet.common.program import new_parser, note, run
from tools.cli import add_output, check_output, layout_of, written


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.merge", __doc__)
    parser.add_argument("controls", nargs="+", metavar="CONTROL", help="two or more, in any layout")
    group = parser.add_argument_group("sum")
    group.add_argument(
        "--weights", nargs="+", type=float, metavar="X", help="one for each CONTROL, used as given (default: the mean)"
    )
    group.add_argument("--base", metavar="BASE", help="what to add to those that are stored as a difference")
    add_output(parser)
    args = parser.parse_args(argv)
    return run("merge", lambda: merge(args), args.debug)


def merge(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    weights = check_weights(args.weights, len(args.controls))
    import torch

    from controlnet.common.devices import PRECISIONS
    from tools.checkpoints import load_base, load_control

    base = load_base(args.base).unet if args.base else None
    result = load_control(args.controls[0], base)
    dtype = dtype_of(result)
    result.float()
    for own in result.parameters():
        own.data = own * weights[0]  # not in place: the parameter may be a view of the file
    for name, weight in zip(args.controls[1:], weights[1:], strict=True):
        other = load_control(name, base)
        if (result.encoder.config, result.config) != (other.encoder.config, other.config):
            raise ValueError(
                f'"{name}" is of another architecture than "{args.controls[0]}" (family, hint channels or pooling): '
                "give ControlNets of the same one"
            )
        dtype = torch.promote_types(dtype, dtype_of(other))
        for own, theirs in zip(result.parameters(), other.parameters(), strict=True):
            own.data += weight * theirs.float()
    with written(args.out, args.force) as path:
        result.save(path, PRECISIONS.get(args.dtype, dtype), layout_of(args.out))


def check_weights(weights: list[float] | None, count: int) -> list[float]:
    """Raises ValueError unless there are at least two ControlNets and as many finite weights."""
    if count < 2:
        raise ValueError("there is one ControlNet, expected two or more: convert it with tools.convert")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"--weights has {len(weights)} numbers, expected one finite number for each of {count}")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        note(f"merge: the weights add up to {sum(weights):g}, not to 1, so the result is scaled by that")
    return weights


def dtype_of(control):
    return next(control.parameters()).dtype


if __name__ == "__main__":
    sys.exit(main())
