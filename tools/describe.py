"""Says what is in checkpoints: base or ControlNet, layout, family, precision, and what it goes with.

    python -m tools.describe sd15 canny.safetensors
    python -m tools.describe model.ckpt --keys
    python -m tools.describe a.safetensors --diff b.safetensors --values

Files, folders in diffusers' layout and presets are recognised by their keys and shapes, from the headers alone. The
only weights read are those of a ControlNet's zero convolutions, whose norms show whether it was trained; files of at
most 64 MB, and others with --values, are read whole to find NaN and infinite numbers. No pickle is run.

The exit status is 2 if a file cannot be read; with --diff it is 0 if the two are alike, else 1.
"""

import argparse
import json
import sys

from controlnet.common.program import new_parser, note, printable
from tools.cli import run_tool

# --json has all of both.
LINES_AT_MOST = 20  # of a kind of difference
WIDEST = 200  # characters of a text from a file


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.describe", __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, a folder in diffusers' layout, or a preset")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--keys", action="store_true", help="also every key with its shape and type")
    shown.add_argument("--values", action="store_true", help="read all numbers of large files, too")
    shown.add_argument("--diff", metavar="OTHER", help="how FILE and OTHER differ; with --values also in numbers")
    shown.add_argument("--json", action="store_true", help="as JSON: a list of objects, with --diff one object")
    return run_tool(parser, argv, describe)


def describe(args: argparse.Namespace) -> int:
    from tools.description import differences, facts_of

    if args.diff is not None:
        if len(args.files) != 1:
            raise ValueError(f"there are {len(args.files)} FILEs, expected one with --diff")
        found = differences(args.files[0], args.diff, args.values)
        print(json.dumps(found, indent=2) if args.json else difference_text(found, args.values))
        return 1 if found else 0
    found, status = [], 0
    for name in args.files:
        try:
            found.append(facts_of(name, args.values, args.keys))
        except ValueError as error:  # the other files can still be described
            if args.debug or len(args.files) == 1:
                raise
            note(f"describe: {error}".replace("\n", " "))
            status = 2
        else:
            if not args.json:
                print(facts_text(found[-1]))
    if args.json:
        print(json.dumps(found, indent=2))
    return status


def facts_text(facts: dict[str, object]) -> str:
    lines = []
    for name, fact in facts.items():
        if name == "file":
            lines.append(printable(fact))
        elif name in ("metadata", "tensors"):
            lines.append(f"  {name}")
            lines += (f"    {printable(key)}  {printable(shortened(value))}" for key, value in fact.items())
        else:
            lines.append(f"  {name.replace('_', ' '):14} {printable(text_of(fact))}")
    return "\n".join(lines)


def text_of(fact: object) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {text_of(value)}" for name, value in fact.items())
    if isinstance(fact, list):
        return ", ".join(fact[:3]) + (", ..." if len(fact) > 3 else "")
    if isinstance(fact, int):
        return f"{fact:,}"
    return f"{fact:.3g}" if isinstance(fact, float) else "?" if fact is None else fact


def difference_text(found: dict[str, list[str]], values: bool) -> str:
    lines = []
    for what, items in found.items():
        lines += [
            f"{printable(what)} ({len(items)}):",
            *(f"  {printable(shortened(item))}" for item in items[:LINES_AT_MOST]),
        ]
        if len(items) > LINES_AT_MOST:
            lines.append(f"  ... and {len(items) - LINES_AT_MOST} more")
    return "\n".join(lines) or f"alike in keys, shapes, types and metadata{' and numbers' if values else ''}"


def shortened(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}..."


if __name__ == "__main__":
    sys.exit(main())
