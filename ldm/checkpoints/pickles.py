"""PyTorch's pickles (.ckpt, .pth, .pt, .bin), read by PyTorch's own reader of weights.

A pickle is a program that builds objects, and may call anything while it does so. `torch.load(weights_only=True)`
allows it only what describes tensors and plain data. Trainers leave more beside the weights (the name of a callback, a
NumPy number), for which PyTorch would refuse the whole file: empty classes stand in for those. Nothing that the file
names is imported.
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from .pickle_scan import Refused, Scan
from .stored import CheckpointError, Damaged, StoredTensor

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of a file from before PyTorch 1.6
LARGEST_PROGRAM = 10_000_000  # bytes of instructions, the weights apart: a whole base with its optimizer has 0.4 MB

# Names that trainers leave in checkpoints, beside those that PyTorch knows.
LEFTOVER_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
LEFTOVERS = """
    argparse.Namespace builtins.dict builtins.float builtins.int builtins.list builtins.str collections.defaultdict
    numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar numpy._core.multiarray._reconstruct
    numpy._core.multiarray.scalar numpy.dtype numpy.ndarray pathlib.PosixPath pathlib.WindowsPath
    torch.nn.modules.container.ParameterDict typing.Any
"""
LEFTOVER_NAMES = frozenset(LEFTOVERS.split())


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors by name: those of "state_dict" if there is one, else all (`tensors_by_name` says how).

    The weights stay on disk, except that a file from before PyTorch 1.6 is read whole.
    Raises Refused for a pickle that does more than describe tensors, Damaged for a file that is incomplete.
    """
    try:
        check_archive(path)
        names = {name for program in programs(path) for name in Scan(LEFTOVER_NAMES, LEFTOVER_PACKAGES).run(program)}
        leftovers = LEFTOVER_NAMES | {name for name in names if name.startswith(LEFTOVER_PACKAGES)}
        with safe_globals([stand_in(name) for name in leftovers]):
            values = torch.load(path, map_location="cpu", mmap=is_zip(path), weights_only=True)
        return {
            name: StoredTensor(path, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
            for name, tensor in tensors_by_name(values, path.stat().st_size).items()
        }
    except (CheckpointError, Damaged, Refused, OSError):
        raise
    except zipfile.BadZipFile as error:
        raise Damaged(f"it is not a complete zip archive ({error!s:.200})") from error
    except pickle.UnpicklingError as error:
        raise Refused(asked_for(str(error))) from error
    except Exception as error:  # damaged instructions fail in any way
        raise Damaged(f"its pickle makes no sense ({type(error).__name__})") from error


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def check_archive(path: Path) -> None:
    """What PyTorch takes on trust in a zip archive, which holds the pickle in data.pkl and each storage in a file.

    Raises CheckpointError for an archive of something else, Damaged for one that torch.save would not write.
    """
    if not is_zip(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if not any(record.filename.endswith("data.pkl") for record in records):
        raise CheckpointError(
            f'"{path}" is a zip archive that PyTorch did not write: unpack it, and give the checkpoint in it'
        )
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise Damaged(f"{record.filename!r:.200} is compressed or encrypted: save it again with torch.save")
        if record.filename.endswith(".pkl") and record.file_size > LARGEST_PROGRAM:
            raise Damaged(f"its pickle has {record.file_size} bytes, expected at most {LARGEST_PROGRAM}")


def programs(path: Path) -> Iterator[BinaryIO]:
    """Each pickle of the file, as PyTorch finds it."""
    if is_zip(path):
        yield io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
        return
    with open(path, "rb") as file:
        start = io.BytesIO(file.read(LARGEST_PROGRAM))
    # A magic number, a version, the machine, the objects, and the names of the storages, which follow.
    yield from [start] * 5


class Leftover:
    """Takes any arguments and keeps nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class LeftoverDict:
    """Makes a plain dictionary, as PyTorch lets a pickle fill no others."""

    def __new__(cls, *_):
        return OrderedDict()


class LeftoverParameters(dict):
    """A module's parameters as a dictionary: the first textual inversions keep their vectors in one."""

    def __setstate__(self, state):
        self.update(state.get("_parameters") or {})


def stand_in(name: str) -> type:
    """One of the classes above under the name of another."""
    module, _, last = name.rpartition(".")
    others = {"ParameterDict": LeftoverParameters, "defaultdict": LeftoverDict, "AttributeDict": LeftoverDict}
    return type(last, (others.get(last, Leftover),), {"__module__": module})


def tensors_by_name(values: object, file_size: int) -> dict[str, Tensor]:
    """The tensors of the outermost dictionary, or of its "state_dict", and those inside its values under joined names
    ("module.control_model. ..."), by which the file can be recognised. Raises Damaged if there is no dictionary, or for
    a tensor larger than its data.
    """
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    if not isinstance(values, dict):
        raise Damaged("it holds no tensors by name: save a model's state_dict")
    tensors = {name: value.detach() for name, value in inner_items(values, "", 3, set()) if is_plain(value)}
    for name, tensor in tensors.items():
        size = tensor.untyped_storage().nbytes()
        # Strides of 0 make much of little.
        if tensor.numel() * tensor.element_size() > size or size > file_size:
            raise Damaged(f"{name!r:.200} reaches beyond its data")
    return tensors


def inner_items(values: object, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, object]]:
    """What lists and dictionaries hold. Each is looked into once: a short pickle can make them hold each other."""
    if not isinstance(values, list | tuple | dict):
        yield name.removeprefix("."), values
    elif depth and id(values) not in seen:
        seen.add(id(values))
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from inner_items(value, f"{name}.{key}", depth - 1, seen)


def is_plain(value: object) -> bool:
    """A tensor whose numbers lie in memory: not sparse, quantised or without any."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    return value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized


def asked_for(message: str) -> str:
    """What PyTorch refused, from its message of many lines."""
    name = re.search(r"GLOBAL (.{1,200}?) (?:was not an allowed|whose module)", message)
    return repr(name[1]) if name else "something other than tensors"
