"""What the programs share: options as fields of a dataclass, types of arguments, and errors as one sentence.

Nothing here imports PyTorch, so `--help` answers at once.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, field, fields
from pathlib import Path
from threading import Timer
from typing import Any

from .errors import DISK_ADVICE, in_a_sentence

SPINS = "3000"  # before a waiting thread sleeps: 0 costs a fifth on an idle machine, 10,000 a half on a busy one
LONGEST_NOTE = 3000  # characters
DTYPE_NAMES = ("fp32", "fp16", "bf16")  # of weights in files
PRECISION_NAMES = ("fp32", "tf32", "fp16", "bf16")  # of a computation; devices.PRECISIONS has the networks' types
PRECISION_HELP = (
    "what the networks compute in. fp32: in full, on CUDA too; tf32: on CUDA the factors of products are rounded to 10 "
    "bits, which is faster; fp16 and bf16: half the memory and faster still, bf16 with fewer digits, but no overflow"
)
FITS = ("stretch", "crop", "pad")  # images.fitted does them


# ------------------------------------------------------------------------------------------------------------- options


def option(
    group: str,
    help: str,
    default: Any = None,
    *,
    type: Callable[[str], Any] | None = None,
    choices: Iterable[str] | None = None,
    const: Any = None,
    metavar: str | tuple[str, ...] | None = None,
    nargs: int | None = None,
    each: bool = False,
    older: str | None = None,
    **marks: Any,
) -> Any:
    """A field of a settings dataclass that is also an option of its program: `--batch-size` for `batch_size`.

    A default of False makes it a flag. With `each` the option may be repeated, and its value is a list; with `nargs`
    each value in it is a list of so many words. `const` is the value of an option that is given without one, `older`
    another spelling of its flag. `marks`, like "fixed" on resume, are for the program, in the field's metadata.
    """
    argument = dict(help=help, type=type, choices=choices, const=const, metavar=metavar, nargs=nargs)
    metadata = {"group": group, "argument": argument, "each": each, "older": older, **marks}
    return field(default_factory=list, metadata=metadata) if each else field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds an argument for each field, in its group. Options that are not given are not in the parsed namespace."""
    groups = {"": parser}
    for item in fields(settings):
        group = item.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        arguments = {key: value for key, value in item.metadata["argument"].items() if value is not None}
        if item.default is False:
            arguments = {"help": arguments["help"], "action": "store_true"}
        elif item.metadata["each"]:
            arguments["action"] = "append"
        elif "const" in arguments:
            arguments["nargs"] = "?"
        arguments["help"] = arguments["help"].replace("%(default)s", str(item.default))
        flags = filter(None, (flag_of(item.name), item.metadata["older"]))
        groups[group].add_argument(*flags, dest=item.name, default=argparse.SUPPRESS, **arguments)


def from_json(settings: type, values: dict, source: str) -> dict:
    """Settings from a file, each checked as if it were typed, without names that this version does not know. Raises
    ValueError for a value that no command line could give."""
    known = {item.name: item for item in fields(settings)}
    return {name: as_typed(known[name], value, source) for name, value in values.items() if name in known}


def as_typed(item: Field, value: Any, source: str) -> Any:
    argument, found = item.metadata["argument"], f'{source} has {value!r:.80} for "{item.name}"'
    if item.default is False:
        if not isinstance(value, bool):
            raise ValueError(f"{found}, expected true or false")
        return value
    if not item.metadata["each"]:
        if value is None and item.default is not None:
            raise ValueError(f'{source} has nothing for "{item.name}", expected a value')
        return value if value is None else typed(argument, item.name, value, source)
    if not isinstance(value, list):
        raise ValueError(f"{found}, expected a list")
    if count := argument["nargs"]:
        if not all(isinstance(words, list) and len(words) == count for words in value):
            raise ValueError(f"{found}, expected lists of {count}")
        return [[str(word) for word in words] for words in value]
    if None in value and not item.metadata.get("lacking"):
        raise ValueError(f'{source} has nothing for one "{item.name}", expected a value for each')
    return [one if one is None else typed(argument, item.name, one, source) for one in value]


def typed(argument: dict, name: str, value: Any, source: str) -> Any:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        read = (argument["type"] or str)(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f'{source} has {text!r:.80} for "{name}": {error}') from error
    if argument["choices"] and read not in argument["choices"]:
        raise ValueError(f'{source} has {text!r:.80} for "{name}", expected one of {", ".join(argument["choices"])}')
    return read


# --------------------------------------------------------------------------------------------------- types of arguments


def positive(text: str) -> int:
    return at_least(1, text)


def count(text: str) -> int:
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f'it is "{text}", expected a whole number from {least} on')
    return int(text)


def number(text: str) -> float:
    return within(text, "a finite number", math.isfinite)


def positive_number(text: str) -> float:
    return within(text, "a number above 0", lambda value: 0 < value < math.inf)


def limit(text: str) -> float:
    return within(text, "a number above 0, or inf", lambda value: value > 0)


def not_negative(text: str) -> float:
    return within(text, "a number from 0 on", lambda value: 0 <= value < math.inf)


def share(text: str) -> float:
    return within(text, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def numbers(text: str) -> list[float]:
    return [number(part) for part in text.split(",")]


def within(text: str, expected: str, good: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not good(value):
        raise argparse.ArgumentTypeError(f'it is "{text}", expected {expected}')
    return value


def path_argument(text: str) -> Path:
    return Path(path_text(text))


def path_text(text: str) -> str:
    """An empty path would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty, expected a path")
    return text


def interval(text: str) -> str:
    """Steps or, with an m, minutes; returned as typed."""
    try:
        positive_number(text.removesuffix("m")) if text.endswith("m") else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f'it is "{text}", expected steps like 250, or minutes like 10m') from error
    return text


def size_argument(text: str) -> str:
    """512 or 512x768, width first as everywhere outside tensors; returned as typed."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f'it is "{text}", expected pixels like 512, or width x height like 512x768')
    return text.lower()


def height_and_width(size: str) -> tuple[int, int]:
    sides = size.split("x")
    return int(sides[-1]), int(sides[0])


# -------------------------------------------------------------------------------------------------------------- running


def share_cores() -> None:
    """Lets OpenMP's threads sleep while they wait, unless the user has chosen. To be called before PyTorch is imported.

    By default they spin, and beside other programs on the same cores hold up the very threads that they wait for: with
    two busy programs on two cores infer.py took 67 s instead of 3, and like this it takes 6.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT=SPINS)


def stop_quietly() -> None:
    """No traceback where Ctrl-C stops a program before `run` can answer it, as while PyTorch is imported."""
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)


def new_parser(program: str, doc: str) -> argparse.ArgumentParser:
    """`program` is how it is started, `doc` describes it, with an example."""
    parser = argparse.ArgumentParser(
        prog=program, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.register("type", Path, path_argument)  # what type=Path means in all its arguments
    return parser


def note(text: str) -> None:
    """Prints to stderr, without control characters and cut to a length: stdout is for results alone."""
    text = printable(text, kept="\n")
    print(text if len(text) <= LONGEST_NOTE else f"{text[:LONGEST_NOTE]}...", file=sys.stderr)


@contextmanager
def said_if_slow(text: str, seconds: float = 4.0) -> Iterator[None]:
    """A note if what is inside takes longer."""
    timer = Timer(seconds, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def printable(text: str, kept: str = "") -> str:
    """Without control characters, except `kept`: text from a file or a server may hold commands to the terminal."""
    return "".join(letter if letter.isprintable() or letter in kept else "?" for letter in text)


def run(
    name: str,
    work: Callable[[], int | None],
    debug: bool = False,
    stopped: str = "nothing half-written is left",
    memory_advice: str = "close other programs, or take less at once",
    disk_advice: str = DISK_ADVICE,
) -> int:
    """The exit status of `work`: 2 and a sentence for an error that a user can put right, 130 if it is interrupted.

    Other errors keep their traceback, and with `debug` all do. Warnings become sentences, too, each said once: a file
    may be opened again. What stdout cannot encode, in names of files and captions, is printed with backslashes, as
    stderr does.
    """
    warned = set()

    def warn(message: Warning | str, *_: object) -> None:
        if (text := f"{name}: {message}") not in warned:
            warned.add(text)
            note(text)

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = warn
            return work() or 0
    except Exception as error:
        sentence = in_a_sentence(error, memory_advice, disk_advice)
        if debug or sentence is None:
            raise
        note(f"{name}: {sentence}".replace("\n", " "))
        return 2
    except KeyboardInterrupt:
        note(f"\n{name}: stopped, {stopped}")
        return 130


def free_place(path: Path) -> Path:
    """The deepest folder on the way to `path` that exists, in which the missing ones will be made."""
    while not path.exists():
        path = path.parent
    return path
