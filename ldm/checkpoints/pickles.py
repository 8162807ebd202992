"""PyTorch's pickles (.ckpt, .pth, .bin), read by PyTorch's own reader of weights.

A pickle is a program that builds objects, and may call anything while it does so. `torch.load(weights_only=True)`
allows it only what describes tensors and plain data. Trainers leave more beside the weights (the name of a callback, a
NumPy number), for which PyTorch would refuse the whole file: empty classes stand in for those. Nothing that the file
names is imported.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .stored import Damaged, StoredTensor

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of a file from before PyTorch 1.6
LARGEST_PROGRAM = 10_000_000  # bytes of instructions, the weights apart: a whole base with its optimiser has 1 MB

# Names that trainers leave in checkpoints, beside those that PyTorch knows.
LEFTOVER_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
LEFTOVER_NAMES = {
    "argparse.Namespace",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "collections.defaultdict",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.nn.modules.container.ParameterDict",
    "typing.Any",
}


class Refused(Exception):
    """What a pickle asks for beyond tensors and plain data."""


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors by name: the outermost dictionary's, or those of its "state_dict".

    The weights stay on disk; but a file from before PyTorch 1.6 is read whole.
    Raises Refused for a pickle that does more than describe tensors, Damaged for a file that is incomplete.
    """
    try:
        check_archive(path)
        leftovers = LEFTOVER_NAMES | {name for name in names_in(path) if name.startswith(LEFTOVER_PACKAGES)}
        with safe_globals([stand_in(name) for name in leftovers]):
            values = torch.load(path, map_location="cpu", mmap=is_zip(path), weights_only=True)
        return {
            name: StoredTensor(path, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
            for name, tensor in tensors_by_name(values).items()
        }
    except (Damaged, OSError):
        raise
    except zipfile.BadZipFile as error:
        raise Damaged(f"it is no complete zip archive ({error!s:.200})") from error
    except pickle.UnpicklingError as error:
        raise Refused(asked_for(str(error))) from error
    except Exception as error:  # damaged instructions fail in any way
        raise Damaged(f"its pickle makes no sense ({type(error).__name__})") from error


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def check_archive(path: Path) -> None:
    """What PyTorch takes on trust in a zip archive, which holds the pickle in data.pkl and each storage in a file."""
    if not is_zip(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise Damaged(f"{record.filename!r:.200} is compressed or encrypted: save it again with torch.save")
        if record.filename.endswith(".pkl") and record.file_size > LARGEST_PROGRAM:
            raise Damaged(f"its pickle has {record.file_size} bytes, expected at most {LARGEST_PROGRAM}")
    if not any(record.filename.endswith("data.pkl") for record in records):
        raise Damaged("it is a zip archive, but no checkpoint of PyTorch")


def names_in(path: Path) -> Iterable[str]:
    """What the pickle would import: at least all names that PyTorch does not know."""
    if is_zip(path):
        return get_unsafe_globals_in_checkpoint(path)
    with open(path, "rb") as file:
        start = io.BytesIO(file.read(LARGEST_PROGRAM))
    # Four pickles (a magic number, a version, the machine, the objects), then the storages.
    instructions = (instruction for _ in range(4) for instruction in pickletools.genops(start))
    return {argument.replace(" ", ".") for opcode, argument, _ in instructions if opcode.name == "GLOBAL"}


class Leftover:
    """Made of anything, it is nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class LeftoverDict:
    """PyTorch lets a pickle fill only what is a plain dictionary."""

    def __new__(cls, *_):
        return OrderedDict()


def stand_in(name: str) -> type:
    """An empty class under the name of another."""
    module, _, last = name.rpartition(".")
    base = LeftoverDict if last in ("defaultdict", "AttributeDict") else Leftover
    return type(last, (base,), {"__module__": module})


def tensors_by_name(values: object) -> dict[str, Tensor]:
    if isinstance(values, dict):
        values = values.get("state_dict", textual_inversion(values) or values)
    if not isinstance(values, dict):
        raise Damaged("it holds no tensors by name: save a model's state_dict")
    tensors = {str(name): value.detach() for name, value in values.items() if is_plain(value)}
    for name, tensor in tensors.items():
        # Strides of 0 make much of little.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise Damaged(f"{name!r:.200} reaches beyond its data")
    return tensors


def is_plain(value: object) -> bool:
    """A tensor whose numbers lie in memory: not sparse, quantised or without any."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    return value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized


def textual_inversion(values: dict) -> dict[str, object]:
    """The tensors of one by names that it can be recognised by; {} for everything else."""
    parts = {name: values.get(name) for name in ("string_to_param", "string_to_token")}
    return {
        f"{name}.{key}": value for name, part in parts.items() if isinstance(part, dict) for key, value in part.items()
    }


def asked_for(message: str) -> str:
    """What PyTorch refused, from its message of many lines."""
    name = re.search(r"GLOBAL (.{1,200}?) (?:was not an allowed|whose module)", message)
    operand = re.search(r"Unsupported operand (\d+)", message)
    if name:
        return repr(name[1])
    opcode = pickletools.code2op.get(chr(int(operand[1]))) if operand else None
    return f"the instruction {opcode.name}" if opcode else "something else than tensors"
