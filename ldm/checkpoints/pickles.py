"""PyTorch's pickles (.ckpt, .pth, .bin), read without running them.

A pickle is a program that builds objects, and may call anything while it does so. Here its instructions are read with
the standard library's disassembler, and only those are carried out that build plain data: texts, numbers, lists,
dictionaries, and the few calls that describe a tensor. Nothing that the file names is imported or called. This is what
`torch.load(weights_only=True)` allows, but for two differences: tensors stay on disk, and what trainers leave beside
the weights (a callback's name, a NumPy number) is dropped, where PyTorch would refuse the whole file.
"""

import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .mapped import Damaged, MappedFile, Stored, extent, is_shape

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
# Types that have no storage class of their own: the tensor names them.
NAMED_DTYPES = {
    "torch.float8_e4m3fn": torch.float8_e4m3fn,
    "torch.float8_e5m2": torch.float8_e5m2,
}

# Names that trainers leave in checkpoints. They and what is made of them become `LEFTOVER`.
LEFTOVER_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
LEFTOVER_NAMES = {
    "argparse.Namespace",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "collections.Counter",
    "collections.defaultdict",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.nn.modules.container.ParameterDict",  # in textual inversions
    "typing.Any",
    "_codecs.encode",
}
LEFTOVER = object()

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of a file from before PyTorch 1.6
LARGEST_PROGRAM = 500_000_000


class Refused(Exception):
    """A pickle that does more than describe tensors: what it asks for."""


# -------------------------------------------------------------------------------------------------- what is built


@dataclass(frozen=True)
class Name:
    """Something to be imported. It never is."""

    full: str


@dataclass
class Storage:
    """A row of numbers that tensors are cut from; `start`, in bytes, is known once the whole file was looked at."""

    dtype: torch.dtype
    numel: int
    start: int = -1


@dataclass(frozen=True)
class Cut:
    """A tensor as the pickle describes it: `offset` and `strides` count elements of its storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def stored(self, file: MappedFile) -> Stored:
        """Raises Damaged if the storage does not hold that much."""
        size = self.storage.numel * self.storage.dtype.itemsize
        count = max(extent(self.shape, self.strides), math.prod(self.shape))  # strides of 0 make much of little
        end = (self.offset + count) * self.dtype.itemsize if all(self.shape) else 0
        if end > size or self.storage.start < 0 or self.storage.start + size > file.size:
            raise Damaged("a tensor reaches beyond its data")
        start = self.storage.start + self.offset * self.dtype.itemsize
        return Stored(file, self.dtype, self.shape, self.strides, start)


def rebuild_tensor(storage, offset, shape, strides, *_) -> Cut:
    return new_cut(storage, storage.dtype, offset, shape, strides)


def rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> Cut:
    return new_cut(storage, NAMED_DTYPES[dtype.full], offset, shape, strides)


def new_cut(storage, dtype, offset, shape, strides) -> Cut:
    if not (isinstance(storage, Storage) and is_shape(shape) and is_shape(strides) and is_shape([offset])):
        raise Damaged("a tensor is described by something else than numbers")
    if len(shape) != len(strides):
        raise Damaged("a tensor has more sizes than strides, or fewer")
    return Cut(storage, dtype, offset, tuple(shape), tuple(strides))


# All that a pickle can call: our functions under the names of others.
CALLS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes: sizes,
    "collections.OrderedDict": lambda pairs=(): {key: value for key, value in pairs if plain_key(key)},
    "builtins.set": list,
    "__builtin__.set": list,
}


def plain_key(key: object) -> bool:
    """Others may take forever to hash."""
    return isinstance(key, str | int | float | Name)


# ---------------------------------------------------------------------------------------------------- the machine

TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
PUSHED_AS_THEY_ARE = TEXTS | BYTES | NUMBERS
NEW = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
WITHOUT_EFFECT = {"PROTO", "FRAME", "STOP"}


class Machine:
    """Carries out a pickle's instructions on a stack. Raises Refused for one that plain data do not need."""

    def __init__(self, storage_of: Callable[[tuple], Storage]):
        self.storage_of = storage_of
        self.stack: list = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, object] = {}

    def run(self, program: bytes | mmap.mmap) -> object:
        for opcode, argument, _ in pickletools.genops(program):
            self.step(opcode.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: object) -> None:
        if name in PUSHED_AS_THEY_ARE:
            self.stack.append(argument)
        elif name in NEW:
            self.stack.append(NEW[name]())
        elif name in TUPLES:
            self.stack[-TUPLES[name] :] = [tuple(self.stack[-TUPLES[name] :])]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name not in WITHOUT_EFFECT:
            instruction = getattr(self, f"do_{name.lower()}", None)
            if instruction is None:
                raise Refused(f"the instruction {name}")
            instruction(argument)

    def since_mark(self) -> list:
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def do_pop(self, _) -> None:
        self.stack.pop()

    def do_pop_mark(self, _) -> None:
        self.since_mark()

    def do_dup(self, _) -> None:
        self.stack.append(self.stack[-1])

    def do_tuple(self, _) -> None:
        self.stack.append(tuple(self.since_mark()))

    def do_list(self, _) -> None:
        self.stack.append(self.since_mark())

    def do_dict(self, _) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.set_items(items)

    def do_append(self, _) -> None:
        self.extend([self.stack.pop()])

    def do_appends(self, _) -> None:
        self.extend(self.since_mark())

    do_additems = do_appends

    def extend(self, items: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def do_setitem(self, _) -> None:
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def do_setitems(self, _) -> None:
        self.set_items(self.since_mark())

    def set_items(self, items: list) -> None:
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if plain_key(key))

    def do_global(self, argument) -> None:
        self.push_name(argument.replace(" ", ".", 1))

    def do_stack_global(self, _) -> None:
        name = self.stack.pop()
        self.push_name(f"{self.stack.pop()}.{name}")

    def push_name(self, full: str) -> None:
        full = full.replace("torch.cuda.", "torch.", 1)  # very old files name storages by their device
        if full in LEFTOVER_NAMES or full.startswith(LEFTOVER_PACKAGES):
            self.stack.append(LEFTOVER)
        elif full in CALLS or full in STORAGES or full in NAMED_DTYPES:
            self.stack.append(Name(full))
        else:
            raise Refused(repr(full[:200]))

    def do_reduce(self, _) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is LEFTOVER:
            self.stack.append(LEFTOVER)
        elif isinstance(function, Name) and function.full in CALLS:
            self.stack.append(CALLS[function.full](*arguments))
        else:
            raise Refused("a call of what is no function")

    do_newobj = do_reduce

    def do_build(self, _) -> None:
        """The state of an object: attributes, of which plain data have none."""
        self.stack.pop()

    def do_binpersid(self, _) -> None:
        self.stack.append(self.storage_of(self.stack.pop()))


# ------------------------------------------------------------------------------------------------------- the files


def read_pickle(file: MappedFile) -> dict[str, Stored]:
    """The tensors by name: the outermost dictionary's, or those of its "state_dict".

    Raises Refused for a pickle that does more than describe tensors, Damaged for a file that is incomplete.
    """
    try:
        values = read_zip(file) if file.read(0, 4) == ZIP_MAGIC else read_legacy(file)
        return tensors_by_name(values, file)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError, RecursionError) as error:
        # What a machine meets that carries out damaged instructions.
        raise Damaged(f"its pickle makes no sense ({type(error).__name__})") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, struct.error) as error:
        raise Damaged(f"it is no complete zip archive ({str(error):.200})") from error


def tensors_by_name(values: object, file: MappedFile) -> dict[str, Stored]:
    if isinstance(values, dict):
        values = values.get("state_dict", textual_inversion(values) or values)
    if not isinstance(values, dict):
        raise Damaged("it holds no tensors by name: save a model's state_dict")
    return {str(key): value.stored(file) for key, value in values.items() if isinstance(value, Cut)}


def textual_inversion(values: dict) -> dict[str, object]:
    """The tensors of one by names that it can be recognised by; {} for everything else."""
    parts = {name: values.get(name) for name in ("string_to_param", "string_to_token")}
    return {
        f"{name}.{key}": value for name, part in parts.items() if isinstance(part, dict) for key, value in part.items()
    }


def read_zip(file: MappedFile) -> object:
    """PyTorch since 1.6: a zip archive with the pickle in data.pkl and each storage in a file of its own."""
    with zipfile.ZipFile(file.path) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in records or "constants.pkl" in records:
        raise Damaged("it is a zip archive, but no checkpoint of PyTorch")
    if "byteorder" in records and file.read(*record_range(file, records["byteorder"])) != b"little":
        raise Damaged("its numbers are written in big-endian order: save it again on another machine")
    storages: dict[str, Storage] = {}

    def storage_of(identity: tuple) -> Storage:
        _, kind, key, _, numel = identity
        if key not in storages:
            storages[key] = new_storage(kind, numel)
            start, size = record_range(file, records[f"data/{key}"])
            if size < numel * storages[key].dtype.itemsize:
                raise Damaged("a tensor reaches beyond its data")
            storages[key].start = start
        return storages[key]

    start, size = record_range(file, records["data.pkl"])
    if size > LARGEST_PROGRAM:
        raise Damaged(f"its pickle has {size} bytes")
    return Machine(storage_of).run(file.read(start, size))


def record_range(file: MappedFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a file of a zip archive begins, and how many bytes it has. PyTorch doesn't compress them."""
    header = file.read(info.header_offset, 30)
    if header[:4] != ZIP_MAGIC or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Damaged(f"{info.filename!r:.200} is missing, compressed or encrypted: save it again with torch.save")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > file.size:
        raise Damaged(f"{info.filename!r:.200} is cut off")
    return start, info.file_size


def read_legacy(file: MappedFile) -> object:
    """PyTorch before 1.6: a magic number, a version, the machine, the object and the storages' keys, a pickle each;
    then the storages in this order, each after its length (8 bytes)."""
    storages: dict[str, Storage] = {}

    def storage_of(identity: tuple) -> Storage:
        _, kind, key, _, numel, view = identity
        if view is not None:
            raise Damaged("a storage is part of another one: save it again with torch.save")
        if key not in storages:
            storages[key] = new_storage(kind, numel)
        return storages[key]

    with open(file.path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as program:
        _, _, system, values, keys = (Machine(storage_of).run(program) for _ in range(5))
        if not system["little_endian"]:
            raise Damaged("its numbers are written in big-endian order: save it again on another machine")
        position = program.tell()
    for key in keys:
        storage = storages[key]
        if int.from_bytes(file.read(position, 8), "little") != storage.numel:
            raise Damaged("its storages have another length than its pickle says")
        storage.start = position + 8
        position = storage.start + storage.numel * storage.dtype.itemsize
    return values


def new_storage(kind: Name, numel: int) -> Storage:
    if not is_shape([numel]):
        raise Damaged("a storage has no length")
    return Storage(STORAGES[kind.full], numel)
