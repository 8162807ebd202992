"""Merges ControlNets into one whose weights are a weighted sum of theirs, or LoRAs into a base.

    python -m tools.merge canny.safetensors hed.safetensors --weights 0.7 0.3 --out lines.safetensors
    python -m tools.merge --base sd15 --lora ink.safetensors:0.8 --out inked.safetensors

The result costs no more to run than one of them. ControlNets must share an architecture, and should share an origin
(two stages of one training, say, or two trainings on the same base). Sums are computed in fp32.
"""

import argparse
import math
import sys

from controlnet.common.program import new_parser, note
from tools.cli import add_output, check_output, layout_of, run_tool, written


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.merge", __doc__)
    parser.add_argument("controls", nargs="*", metavar="CONTROL", help="two or more, in any layout; none with --lora")
    group = parser.add_argument_group("sum")
    add = group.add_argument
    add("--weights", nargs="+", type=float, metavar="X", help="one for each CONTROL, taken as is (default: the mean)")
    add("--base", metavar="BASE", help="what the LoRAs change, or what to add to ControlNets stored as a difference")
    add("--lora", action="append", metavar="FILE[:X]", help="a LoRA, and how strongly (default: 1); repeatable")
    of_base = parser.add_argument_group("what a base with LoRAs lacks; the result will have it")
    of_base.add_argument("--vae", metavar="FILE", help="in place of its autoencoder, or where it has none")
    of_base.add_argument("--prediction", choices=("eps", "v", "x0"), help="of the base (default: as detected)")
    of_base.add_argument("--zero-snr", action="store_true", help="it was trained with zero terminal SNR")
    add_output(parser)
    return run_tool(parser, argv, merge)


def merge(args: argparse.Namespace) -> None:
    check_output(args.out, args.force)
    if args.lora:
        merge_into_base(args)
        return
    if args.vae or args.prediction or args.zero_snr:
        raise ValueError(
            "--vae, --prediction and --zero-snr are for a base that LoRAs change: leave them out, or add --lora"
        )
    weights = check_weights(args.weights, len(args.controls))
    import torch

    from controlnet.common.devices import PRECISIONS
    from tools.checkpoints import load_control, load_unet

    base = load_unet(args.base) if args.base is not None else None
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


def merge_into_base(args: argparse.Namespace) -> None:
    if args.controls or args.weights or args.base is None:
        raise ValueError("--lora changes a base: give --base, and neither CONTROLs nor --weights")
    import torch

    from controlnet.common.devices import PRECISIONS
    from ldm import StableDiffusion
    from ldm.checkpoints.recognise import open_base
    from tools.checkpoints import base_dtype

    described = dict(prediction=args.prediction, zero_snr=args.zero_snr, vae=args.vae)
    dtype = PRECISIONS.get(args.dtype) or base_dtype(open_base(args.base, **described).checkpoint)
    note(f"reading {args.base} ...")
    sd = StableDiffusion.load(args.base, dtype=torch.float32, loras=args.lora, **described)
    with written(args.out, args.force) as path:
        sd.save(path, dtype, layout_of(args.out))


def check_weights(weights: list[float] | None, count: int) -> list[float]:
    """Raises ValueError unless there are at least two ControlNets and as many finite weights."""
    if count < 2:
        given = "one ControlNet is given" if count else "no ControlNet is given"
        raise ValueError(f"{given}, expected two or more: one alone is converted with tools.convert")
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
