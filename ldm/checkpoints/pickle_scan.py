"""Follows the instructions of a pickle without running them, and refuses small programs that would do endless work.

PyTorch's reader of weights runs nothing harmful, but it does what it is told as often as it is told: a tuple that holds
another twice, forty times over, has 2^40 entries for whoever hashes it; one that is a million tuples deep overflows the
stack; a list can be copied ten thousand times, and a hundred thousand numbers can have the same hash.
"""

import pickletools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

# The instructions that PyTorch's reader knows.
KNOWN = """
    GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWFALSE NEWTRUE
    EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE SHORT_BINSTRING BINPERSID
    BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1 PROTO STOP
"""
# Whether an instruction takes everything since the last mark, and how many values it takes besides.
TAKES = {
    opcode.name: (
        pickletools.markobject in opcode.stack_before,
        sum(taken not in (pickletools.markobject, pickletools.stackslice) for taken in opcode.stack_before),
    )
    for opcode in pickletools.opcodes
}
# Of what PyTorch's reader would call, that which describes plain tensors and plain data.
CALLED = re.compile(
    r"(collections (OrderedDict|Counter)|(__builtin__|builtins) (set|complex)|torch (Size|device)|_codecs encode|"
    r"torch\.serialization _get_layout|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2|"
    r"torch\._utils _rebuild_(parameter(_with_state)?|tensor(_v[23])?|meta_tensor_no_storage))"
)
MOST_INSTRUCTIONS = 500_000  # 30 for each tensor, of which a whole base with its optimizer has 3,000
MOST_WORK = 5_000_000  # objects handed to calls: 20 for each tensor
MOST_HASHED = 10_000  # keys that are not text: an optimizer has one for each parameter
BULK = 50  # from here on what is handed to a call counts as keys
LARGEST_TUPLE = 10_000  # objects, also those of tuples in it: each is hashed where it is a key


class Refused(Exception):
    """What a pickle asks for beyond tensors and plain data, and what to do."""

    def __init__(
        self,
        what: str,
        advice: str = "which no checkpoint needs: nothing in it was run, as it may be malicious; get the model as "
        ".safetensors",
    ):
        super().__init__(what)
        self.advice = advice


@dataclass(slots=True)
class Value:
    """What would be on the stack."""

    kind: str  # the instruction that made it
    size: int = 1  # of a tuple: how many objects it is, written out in full; of a list or dictionary: its entries
    text: str = ""  # also the name of what is imported
    parts: Sequence["Value"] = ()  # of a tuple


class Scan:
    """One pickle. `run` returns the names that it would import; it raises Refused."""

    def __init__(self, harmless: frozenset[str], harmless_packages: tuple[str, ...]):
        """With the names, and the packages, whose classes may be called, too."""
        self.harmless, self.harmless_packages = harmless, harmless_packages
        self.stack, self.marks, self.memo = [], [], {}
        self.names, self.work, self.hashed = set(), 0, 0

    def run(self, program: BinaryIO) -> set[str]:
        known = set(KNOWN.split())
        for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if number > MOST_INSTRUCTIONS:
                raise Refused(f"more than {MOST_INSTRUCTIONS} instructions")
            if opcode.name == "PROTO" and argument > 2:
                raise Refused(
                    f"pickle protocol {argument}",
                    "and PyTorch reads weights of protocol 2 alone: if you trust it, load it with torch.load(..., "
                    "weights_only=False) and save its state_dict with torch.save",
                )
            if opcode.name not in known:
                raise Refused(f"the instruction {opcode.name}")
            self.follow(opcode.name, argument)
        return self.names

    def follow(self, name: str, argument: object) -> None:
        stack, (marked, count) = self.stack, TAKES[name]
        match name:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS":
                items = self.pop(marked, count - 1)  # the list or the dictionary stays
                stack[-1].size += len(items)
                if name.startswith("SETITEM"):
                    for key in items[::2]:
                        self.hash(key)
            case "BUILD":  # copies a dictionary into an object's
                (state,) = self.pop(marked, count - 1)
                self.count([state, *state.parts])
                stack[-1].size += state.size
            case _:
                stack.append(self.made(name, argument, self.pop(marked, count)))

    def pop(self, marked: bool, count: int) -> list[Value]:
        start = self.marks.pop() if marked else len(self.stack) - count
        parts = self.stack[start:]
        del self.stack[start:]
        return parts

    def made(self, name: str, argument: object, parts: list[Value]) -> Value:
        if name == "GLOBAL":
            self.names.add(argument.replace(" ", "."))
        if name.startswith("TUPLE"):
            size = 1 + sum(part.size if part.kind == "TUPLE" else 1 for part in parts)
            if size > LARGEST_TUPLE:
                raise Refused(f"a tuple of more than {LARGEST_TUPLE} objects")
            return Value("TUPLE", size, parts=parts)
        if name == "BINPERSID":  # ("storage", its type, its key, its device, its length, of a view: its key ...)
            for key in parts[0].parts[2::3]:
                self.hash(key)
        if name in ("REDUCE", "NEWOBJ"):
            return Value(name, self.call(*parts), "bytes" if parts[0].text == "_codecs encode" else "")
        text = argument if isinstance(argument, str) else ""
        return Value(name, 1 + len(text) // 64, text)

    def hash(self, key: Value) -> None:
        self.count([key], not key.text and key.kind != "NONE")

    def call(self, function: Value, arguments: Value) -> int:
        """-> the size of what the call returns, at most."""
        if function.kind != "GLOBAL" or not arguments.kind.endswith("TUPLE"):
            raise Refused("a call of what it has made itself")
        name = function.text
        if name.endswith("_rebuild_from_type_v2"):  # of a function, a type, its arguments and a state
            return self.call(arguments.parts[0], arguments.parts[2])
        dotted = name.replace(" ", ".")
        if not (CALLED.fullmatch(name) or dotted in self.harmless or dotted.startswith(self.harmless_packages)):
            raise Refused(f"{dotted!r:.200}")
        if name == "_codecs encode" and arguments.parts[1].text != "latin1":
            raise Refused(f"the encoding {arguments.parts[1].text!r:.200}")
        self.count(arguments.parts)
        return 1 if name.startswith("torch._utils") else 1 + sum(part.size for part in arguments.parts)

    def count(self, parts: Sequence[Value], hashed: int = 0) -> None:
        """Adds to the work what a call has to look at, and to the keys what of it may be hashed."""
        self.work += 1 + sum(part.size for part in parts)
        self.hashed += hashed + sum(part.size for part in parts if part.size > BULK and not part.text)
        if self.work > MOST_WORK or self.hashed > MOST_HASHED:
            raise Refused("endless work")
