"""What the tools share: how they are run, --device, and where the checkpoints that they make go. PyTorch is not
needed."""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from controlnet.common.program import DTYPE_NAMES, free_place, note, run

PICKLES = (".ckpt", ".pth", ".pt", ".bin")


def run_tool(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    work: Callable[[argparse.Namespace], int | None],
    stopped: str = "nothing half-written is left",
) -> int:
    """The exit status of `work` with the options that are typed, as of `program.run`; `stopped` names them in braces.
    Adds --debug, the last of all."""
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    name = parser.prog.removeprefix("python -m tools.")
    return run(name, lambda: work(args), args.debug, stopped.format(**vars(args)))


def add_device(parser: argparse.ArgumentParser) -> None:
    help = "cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)"
    parser.add_argument("--device", metavar="NAME", help=help)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options about the result, in a group at the end."""
    group = parser.add_argument_group("result")
    layouts = "a name ending in .safetensors makes a file in the original layout, any other a folder in diffusers'"
    group.add_argument("--out", type=Path, required=True, metavar="OUT", help=layouts)
    group.add_argument("--dtype", choices=DTYPE_NAMES, help="of the weights (default: the widest of the source's)")
    group.add_argument("--force", action="store_true", help="replace OUT if it exists (default: refuse)")


def layout_of(out: Path) -> str:
    """ "ldm" or "diffusers". Raises ValueError for the name of a pickle, a format that is not written here."""
    if out.suffix.lower() in PICKLES:
        raise ValueError(f'--out is "{out}", but only safetensors are written: give a name that ends in .safetensors')
    return "ldm" if out.suffix.lower() == ".safetensors" else "diffusers"


def check_output(out: Path, force: bool) -> None:
    """To be called before the work begins. Raises ValueError if nothing can or may be written to `out`."""
    layout = layout_of(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise ValueError(f'"{out}" exists: give another name, or --force to replace it')
        if out.is_dir() != (layout == "diffusers"):
            raise ValueError(f'"{out}" is a {"folder" if out.is_dir() else "file"}: give another name')
        if out.is_dir() and not holds_model(out):
            raise ValueError(f'"{out}" is a folder that holds no model, so it is not replaced: give another name')
    check_place(out)


def check_place(out: Path) -> None:
    place = free_place(out.absolute().parent)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f'"{out}" cannot be written: "{place}" is not a folder that you may write to, give another')


def check_picture(out: Path, option: str) -> None:
    """To be called before the work begins. Raises ValueError if no PNG can be written to `out`; says if one will be
    replaced."""
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f'{option} is "{out}", expected the name of a file ending in .png')
    check_place(out)
    if out.exists():
        note(f"{out} will be replaced")


def holds_model(folder: Path) -> bool:
    """By diffusers' configuration, which names a class: other programs, too, have a config.json."""
    files = (folder / name for name in ("model_index.json", "config.json"))
    return any(file.is_file() and '"_class_name"' in file.read_text(errors="replace") for file in files)


def make_folder(path: Path, argument: str) -> None:
    """Raises ValueError if `path`, given as `argument`, cannot be a folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f'{argument} is "{path}", which cannot be a folder ({error.strerror}): choose another'
        ) from error


@contextmanager
def written(out: Path, force: bool) -> Iterator[Path]:
    """The path to save a result under, which becomes `out` once it is complete. Prints its size.

    Whatever saves a file already writes it atomically, so only a folder that is replaced needs a temporary name.
    Raises ValueError if files of that folder would be lost, having no successor of their name.
    """
    check_output(out, force)
    note(f"writing {out} ...")
    if not out.is_dir():
        yield out
    else:
        from ldm.checkpoints.files import temporary_folder

        with temporary_folder(out) as beside:
            yield beside / "new"
            replace_folder(out, beside / "new")
    files = [out] if out.is_file() else [out / name for name in files_in(out)]
    print(f"{out}: {sum(file.stat().st_size for file in files) / 1e9:.2f} GB")


def replace_folder(out: Path, new: Path) -> None:
    """Nothing of `out` is gone before `new` has its name."""
    from ldm.checkpoints.stored import first_few

    if lost := files_in(out) - files_in(new):
        raise ValueError(
            f'"{out}" holds more than the result, which would be lost ({first_few(sorted(lost))}): move that away, or '
            "give another name"
        )
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        os.replace(out, old)
        os.replace(new, out)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
    shutil.rmtree(old, ignore_errors=True)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
