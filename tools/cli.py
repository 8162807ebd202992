"""What the programs that make and change checkpoints have in common: errors, notes, and where results go."""

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PICKLES = (".ckpt", ".pth", ".pt", ".bin")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def new_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """For the tool `name`, which `doc` describes, with an example."""
    return argparse.ArgumentParser(
        prog=f"python -m tools.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """The group of options about the result, the last one."""
    group = parser.add_argument_group("result")
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="a name that ends in .safetensors is a file in the original layout, any other a folder in diffusers'",
    )
    add_dtype(group)
    group.add_argument("--force", action="store_true", help="replace OUT if it exists (default: refuse)")
    add_debug(parser)


def add_dtype(group) -> None:
    group.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as they are; of a mixture the widest type)"
    )


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def run(
    name: str,
    work: Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
    stopped: str = "nothing half-written is left",
) -> int:
    """The exit status of `work`: what a user can put right is one sentence and 2, a stop from the keyboard 130."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: note(f"{name}: {message}")
            return work(args) or 0
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: stopped, {stopped}", file=sys.stderr)
        return 130


def note(text: str) -> None:
    """To stderr: stdout has the results alone."""
    print(text, file=sys.stderr)


def layout_of(out: Path) -> str:
    """ "ldm" or "diffusers". Raises ValueError for the name of a pickle, which is not written here."""
    if out.suffix.lower() in PICKLES:
        raise ValueError(f'--out is "{out}", but only safetensors are written: give a name that ends in .safetensors')
    return "ldm" if out.suffix.lower() == ".safetensors" else "diffusers"


def check_output(out: Path, force: bool) -> None:
    """Before time is spent on it. Raises ValueError for a place where nothing can or may be written."""
    layout = layout_of(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise ValueError(f'"{out}" exists: give another name, or --force to replace it')
        if out.is_dir() != (layout == "diffusers"):
            raise ValueError(f'"{out}" is a {"folder" if out.is_dir() else "file"}: give another name')
        if out.is_dir() and not any((out / file).is_file() for file in ("model_index.json", "config.json")):
            raise ValueError(f'"{out}" is a folder of something else than a model, not replaced: give another name')
    there = out.absolute().parent
    while not there.exists():  # the folders that are not there will be made
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f'"{out}" cannot be written, as "{there}" is no folder that you may write to: give another')


@contextmanager
def written(out: Path, force: bool) -> Iterator[Path]:
    """A new name to save under, which takes the place of `out` when all is written. Says how large the result is.

    Files are written so by what saves them; folders only where there is none yet.
    """
    check_output(out, force)
    note(f"writing {out} ...")
    if not out.is_dir():
        yield out
    else:
        new, old = (out.with_name(f".{out.name}.{which}") for which in ("new", "old"))
        for left_over in (new, old):
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            yield new
            os.replace(out, old)
            os.replace(new, out)
        finally:
            if old.exists() and not out.exists():
                os.replace(old, out)
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    print(f"{out}: {sum(file.stat().st_size for file in files) / 1e9:.2f} GB")
