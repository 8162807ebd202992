"""Says what is in checkpoints: base or ControlNet, layout, family, parts, precision, and what it goes with.

    python -m tools.describe sd15 canny.safetensors
    python -m tools.describe model.ckpt --keys
    python -m tools.describe a.safetensors --diff b.safetensors --values

Files, folders in diffusers' layout and presets in weights/ are told by their keys and shapes, from the headers alone.
Of the numbers only those of a ControlNet's zero convolutions are read, as their norms say whether it was trained; all
are read, to find NaN and infinite ones, in files of at most 64 MB and with --values. No pickle is run.

The exit status is 2 if a file cannot be read, and with --diff 0 or 1 as the two are alike or not.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # for `python tools/describe.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import math

from tools.cli import add_debug, new_parser, note, run

READ_ANYWAY = 64_000_000  # bytes: of smaller files all numbers are read
SHOWN_AT_MOST = 20  # lines of a list, and
WIDEST_VALUE = 200  # characters of a metadata text; --json has all

Facts = dict[str, object]


def main(argv: list[str] | None = None) -> int:
    return run("describe", describe, parse_args(argv))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("describe", __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, a folder in diffusers' layout, or a preset")
    what = parser.add_argument_group("what is shown")
    what.add_argument("--keys", action="store_true", help="every key with its shape and type, too")
    what.add_argument("--values", action="store_true", help="read all numbers of large files, too")
    what.add_argument("--diff", metavar="OTHER", help="in what FILE and OTHER differ, with --values also in numbers")
    what.add_argument("--json", action="store_true", help="as JSON: a list of objects, with --diff one object")
    add_debug(parser)
    return parser.parse_args(argv)


def describe(args: argparse.Namespace) -> int:
    if args.diff:
        return describe_difference(args)
    found, status = [], 0
    for name in args.files:
        try:
            found.append(facts_of(name, args.values, args.keys))
        except ValueError as error:  # the other files can still be told
            if args.debug or len(args.files) == 1:
                raise
            note(f"describe: {error}")
            status = 2
            continue
        if not args.json:
            print("\n".join(lines_of(found[-1])))
    if args.json:
        print(json.dumps(found, indent=2))
    return status


# ------------------------------------------------------------------------------------------------------- one file


def facts_of(name: str, values: bool, keys: bool) -> Facts:
    """All that is told of a file, as JSON has it. Raises CheckpointError for a file that cannot be read."""
    from ldm.checkpoints.checkpoint import open_checkpoint
    from ldm.checkpoints.recognise import contents
    from ldm.stable_diffusion import find

    path, preset = find(name)
    checkpoint = open_checkpoint(path)
    by_name = preset is not None and "config" not in checkpoint.metadata  # as `StableDiffusion.load` has it
    found = contents(checkpoint, preset.schedule.prediction if by_name else None)
    problem = problem_of(checkpoint, found)
    size = sum(file.stat().st_size for file in {tensor.file.path for tensor in checkpoint.tensors.values()})
    facts = {
        "file": str(path),
        "bytes": size,
        "kind": found.kind,
        "layout": found.layout,
        "family": found.family,
        "base": base_facts(found.base, by_name) if found.base else None,
        "control": control_facts(checkpoint, found.control) if found.control else None,
        "goes_with": None if problem else goes_with(found),
        "problem": problem,
        "parameters": found.parameters,
        "dtypes": found.dtypes,
        "ema": found.ema,
        "not_finite": not_finite(checkpoint) if values or size <= READ_ANYWAY else None,
        "metadata": checkpoint.metadata,
    }
    if keys:
        facts["tensors"] = {
            key: {"shape": list(tensor.shape), "dtype": type_name(tensor)}
            for key, tensor in sorted(checkpoint.tensors.items())
        }
    return facts


def problem_of(checkpoint, found) -> str | None:
    """Why a base or a ControlNet does not load though it was recognised, by its keys and shapes."""
    from controlnet import ControlNet
    from ldm import StableDiffusion
    from ldm.checkpoints.checkpoint import (
        IGNORED_BESIDE_BASE,
        IGNORED_BESIDE_CONTROL,
        CheckpointError,
        check_keys,
        without_weights,
    )
    from ldm.unet import UNet
    from tools.checkpoints import control_unet_config

    try:
        if found.base:
            with without_weights():
                base = StableDiffusion(found.base.config)
            check_keys(checkpoint, base.parts(found.base.layout), IGNORED_BESIDE_BASE)
        if found.control:
            unet = control_unet_config(checkpoint, found.control)
            with without_weights():
                control = ControlNet(UNet(unet), found.control.config)
            check_keys(checkpoint, [(control, found.control.key_map(unet))], IGNORED_BESIDE_CONTROL)
    except CheckpointError as error:
        return str(error)
    return None


def base_facts(base, by_name: bool) -> Facts:
    return {
        "architecture": base.config.name,
        "prediction": base.config.schedule.prediction,
        "prediction_known_from": "its name, that of a published file" if by_name else base.prediction_source,
        "resolution": base.config.resolution,
    }


def control_facts(checkpoint, control) -> Facts:
    from ldm.checkpoints.recognise import described_config

    described = "control" in (described_config(checkpoint) or {})
    return {
        "hint_channels": control.config.hint_channels,
        "difference": control.difference,
        "global_average_pooling": control.config.global_average_pooling,
        "pooling_is_known": described or (control.layout == "diffusers" and bool(checkpoint.configs)),
        "zero_convolutions": zero_convolutions(checkpoint, control),
    }


def zero_convolutions(checkpoint, control) -> dict[str, float | None]:
    """The Euclidean norm of each one's weights, in the encoder's order: of the hint's, of the blocks', of the middle's.

    None for one that the file lacks or whose norm is no number.
    """
    import torch

    from ldm.checkpoints.checkpoint import CheckpointError
    from ldm.checkpoints.key_maps import encoder_length
    from tools.checkpoints import control_unet_config

    try:
        unet = control_unet_config(checkpoint, control)
    except CheckpointError:
        return {}
    last = len(control.config.hint_widths)
    blocks = [(f"block {i}", f"zero_convs.{i}") for i in range(encoder_length(unet))]
    modules = {"hint": f"hint_encoder.convs.{last}", **dict(blocks), "middle": "middle_zero_conv"}
    sources = control.key_map(unet).sources(f"{module}.weight" for module in modules.values())
    norms = {}
    for name, module in modules.items():
        tensor = checkpoint.tensors.get(sources[f"{module}.weight"].key)
        norm = tensor.load(torch.float32, torch.device("cpu")).norm().item() if tensor else math.nan
        norms[name] = norm if math.isfinite(norm) else None
    return norms


def not_finite(checkpoint) -> list[str]:
    """The keys of the tensors in which a number is NaN or infinite."""
    return [key for key, tensor in floats_of(checkpoint) if not is_finite(as_countable(tensor))]


def is_finite(tensor) -> bool:
    import ldm.checkpoints.checkpoint

    return ldm.checkpoints.checkpoint.is_finite(tensor)


def floats_of(checkpoint):
    """(key, tensor) of the floating-point ones, with a bar, one after the other in the order of the file."""
    from tqdm import tqdm

    tensors = [(key, tensor) for key, tensor in checkpoint.tensors.items() if tensor.dtype.is_floating_point]
    tensors.sort(key=lambda item: (str(item[1].file.path), item[1].start))
    return tqdm(tensors, "reading", unit="tensor", leave=False, disable=None)


def as_countable(tensor):
    """Its numbers, in a type that PyTorch can count with: not in 8 bits."""
    import torch

    return tensor.load(tensor.dtype if tensor.dtype.itemsize > 1 else torch.float16, torch.device("cpu"))


def goes_with(found) -> str | None:
    family = found.family or "the same architecture"
    if found.base and found.control:
        return f"each other: pass it as --base and as --control; also with other models of {family}"
    if found.base:
        return f"ControlNets of {family}: pass it as --base"
    if found.control and found.control.difference:
        return f"any base of {family}, which is added to it as it is loaded: pass it as --control"
    if found.control:
        return f"bases of {family}, best the one that it was trained on: pass it as --control"
    return None


def type_name(tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------ as a text


def lines_of(facts: Facts) -> list[str]:
    """What is known of one file, a line a fact."""
    family = f" of {facts['family']}" if facts["family"] and facts["layout"] else ""
    layouts = {"ldm": ", original layout", "diffusers": ", diffusers' layout", None: ""}
    rows = [("what", facts["kind"] + family + layouts[facts["layout"]])]
    rows += base_rows(facts["base"]) + control_rows(facts["control"])
    if facts["problem"]:
        rows.append(("not usable", facts["problem"]))
    if facts["goes_with"]:
        rows.append(("goes with", facts["goes_with"]))
    rows.append(("parameters", counts(facts["parameters"])))
    rows.append(("precision", counts(facts["dtypes"])))
    if facts["ema"]:
        rows.append(("EMA", "the UNet's moving average is there, too"))
    rows.append(("values", values_line(facts["not_finite"])))
    rows += [("metadata", f"{key} = {shortened(value)}") for key, value in facts["metadata"].items()]
    lines = [
        f"{facts['file']} ({facts['bytes'] / 1e6:,.1f} MB)",
        *(f"  {name:11} {plain(text)}" for name, text in rows),
    ]
    for key, tensor in facts.get("tensors", {}).items():
        lines.append(f"  {plain(key)}  {tensor['shape']}  {tensor['dtype']}")
    return lines


def base_rows(base: Facts | None) -> list[tuple[str, str]]:
    if base is None:
        return []
    return [
        ("base", f"{base['architecture']}, {base['resolution']} pixels"),
        ("predicts", f"{base['prediction']}, known from: {base['prediction_known_from']}"),
    ]


def control_rows(control: Facts | None) -> list[tuple[str, str]]:
    if control is None:
        return []
    rows = [("hints", f"of {control['hint_channels']} channels")]
    if control["difference"]:
        rows.append(("difference", "its copy of the encoder is stored minus the base's"))
    if control["global_average_pooling"]:
        rows.append(("pooling", "its residuals are averaged over the picture (a shuffle model)"))
    elif not control["pooling_is_known"]:
        rows.append(
            ("pooling", "none; if it is a shuffle model the file does not say so, and --control-mode shuffle must")
        )
    norms = control["zero_convolutions"]
    if norms:
        text = ", ".join(f"{name} {'?' if norm is None else format(norm, '.3g')}" for name, norm in norms.items())
        untrained = (
            ": all zero, so that it was not trained" if not any(norms.values()) and None not in norms.values() else ""
        )
        rows.append(("zero convs", f"norms {text}{untrained}"))
    return rows


def values_line(keys: list[str] | None) -> str:
    if keys is None:
        return "not read (--values reads them all)"
    if not keys:
        return "all finite"
    return f"NaN or infinite in {len(keys)} tensor{'' if len(keys) == 1 else 's'}, the first {keys[0]}"


def counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items()) or "none"


def shortened(text: str) -> str:
    return text if len(text) <= WIDEST_VALUE else f"{text[:WIDEST_VALUE]}..."


def plain(text: str) -> str:
    """Without line ends and what steers a terminal: a file may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# -------------------------------------------------------------------------------------------------- two compared


def describe_difference(args: argparse.Namespace) -> int:
    from ldm.checkpoints.checkpoint import open_checkpoint
    from ldm.stable_diffusion import find

    if len(args.files) != 1:
        raise ValueError(f"there are {len(args.files)} FILEs, expected one with --diff")
    first, second = (open_checkpoint(find(name)[0]) for name in (args.files[0], args.diff))
    difference = compare(first, second, args.values)
    alike = not any(difference.values())
    if args.json:
        print(json.dumps(difference, indent=2))
    elif alike:
        print(f"alike in keys, shapes, types and metadata{' and numbers' if args.values else ''}")
    else:
        print("\n".join(difference_lines(difference)))
    return 0 if alike else 1


def compare(first, second, values: bool) -> dict[str, list[str]]:
    """What differs -> a line for each difference. `numbers` are those of tensors of equal shapes, None if not read."""
    common = sorted(first.keys & second.keys)
    pairs = {key: (first.tensors[key], second.tensors[key]) for key in common}
    names = sorted(first.metadata.keys() | second.metadata.keys())
    metadata = [(name, first.metadata.get(name), second.metadata.get(name)) for name in names]
    return {
        f"only in {first.path}": sorted(first.keys - second.keys),
        f"only in {second.path}": sorted(second.keys - first.keys),
        "shapes": [f"{k}: {list(a.shape)}, {list(b.shape)}" for k, (a, b) in pairs.items() if a.shape != b.shape],
        "types": [f"{k}: {type_name(a)}, {type_name(b)}" for k, (a, b) in pairs.items() if a.dtype != b.dtype],
        "metadata": [f"{name}: {json.dumps(a)}, {json.dumps(b)}" for name, a, b in metadata if a != b],
        **({"numbers": compare_numbers(pairs)} if values else {}),
    }


def compare_numbers(pairs: dict) -> list[str]:
    """The largest distance of two numbers, for each tensor that has any; NaN is no distance from NaN."""
    import torch
    from tqdm import tqdm

    lines = []
    for key, (first, second) in tqdm(pairs.items(), "comparing", unit="tensor", leave=False, disable=None):
        if first.shape != second.shape:
            continue
        a, b = (tensor.load(torch.float64, torch.device("cpu")) for tensor in (first, second))
        unlike = ~((a == b) | (a.isnan() & b.isnan()))
        if unlike.any():
            distance = (a - b)[unlike].abs().max().item()
            lines.append(f"{key}: {int(unlike.sum()):,} of {a.numel():,} numbers, by up to {distance:.3g}")
    return lines


def difference_lines(difference: dict[str, list[str]]) -> list[str]:
    lines = []
    for what, items in difference.items():
        if items:
            lines += [f"{what} ({len(items)}):", *(f"  {plain(shortened(item))}" for item in items[:SHOWN_AT_MOST])]
            if len(items) > SHOWN_AT_MOST:
                lines.append(f"  ... and {len(items) - SHOWN_AT_MOST} more")
    return lines


if __name__ == "__main__":
    sys.exit(main())
