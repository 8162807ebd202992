"""Damaged and malicious files of every layout: each loads, or is refused with one sentence.

Never another exception, a hang, a large allocation, or code of the file that runs. The seed is fixed.
"""

import io
import json
import os
import pickle
import pickletools
import random
import re
import resource
import struct
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from controlnet.config import ControlConfig
from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints import pickle_scan
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.recognise import identify
from ldm.checkpoints.stored import CheckpointError
from ldm.config import Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.unet import UNet
from tools.description import contents

MUTATIONS = 40  # of each file
SLOW = 10.0  # seconds of computing that no file may take: the worst here takes one, on an idle machine

# Every kind of layer once, with as few numbers as possible.
SPECK = Config(
    "speck",
    unet=UNetConfig(
        channels=4, multipliers=(1, 1), blocks=1, attention=(False, True), heads=(1, 2), context_width=4, groups=2
    ),
    vae=VAEConfig(channels=2, multipliers=(1, 1), blocks=1, groups=1),
    text=TextConfig(width=4, heads=1, layers=1, vocabulary=514),
    schedule=ScheduleConfig("v"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One small file of every kind, by name: its bytes."""
    folder = tmp_path_factory.mktemp("files")
    sd = StableDiffusion(SPECK)
    control = ControlNet.from_unet(sd.unet, ControlConfig(hint_widths=(2, 2, 2, 2, 2, 2, 2)))
    sd.save(folder / "base.safetensors", torch.float16)
    control.save(folder / "control.safetensors", torch.float16)
    control.save(folder / "diffusers", torch.float16, layout="diffusers")
    control.save(folder / "difference.safetensors", torch.float16, difference_to=sd.unet)
    tensors = load_file(folder / "control.safetensors")
    for name, new in (("zip.ckpt", True), ("legacy.ckpt", False)):
        values = {"state_dict": OrderedDict(tensors), "epoch": 3, "callbacks": {}}
        torch.save(values, folder / name, _use_new_zipfile_serialization=new)
    # The header and a little of the tensors is where all decisions are made.
    names = ["base.safetensors", "control.safetensors", "difference.safetensors", "zip.ckpt", "legacy.ckpt"]
    found = {name: (folder / name).read_bytes() for name in names}
    return found | {"diffusers": (folder / "diffusers" / "diffusion_pytorch_model.safetensors").read_bytes()}


@pytest.fixture(scope="module")
def unet():
    return UNet(SPECK.unet).requires_grad_(False)


def outcome(path, unet, described=True, honest=None):
    """What becomes of a file, described or not: the sentence that refuses it, or None. Anything else raises.

    A base that is found to be `honest` is known to load."""
    started = time.process_time()
    sentence = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checkpoint = open_checkpoint(path)
            if described:
                contents(checkpoint)
            if checkpoint.any_key("model.diffusion_model.") or checkpoint.any_key("unet."):
                base = identify(checkpoint)
                if base.config != honest:
                    StableDiffusion.from_checkpoint(base.checkpoint, base.config)
            else:
                ControlNet.load(path, unet)
        except CheckpointError as error:
            sentence = str(error)
            assert "\n" not in sentence and len(sentence) < 3000
    assert time.process_time() - started < SLOW
    return sentence


def header_end(data):
    """Where the part ends that describes the tensors."""
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.getinfo(next(n for n in archive.namelist() if n.endswith("data.pkl"))).file_size + 100
    return 8 + int.from_bytes(data[:8], "little") if data[8:9] == b"{" else len(data) // 2


def mutated(data, random):
    """One to three random changes, most of them in the header; for a zip archive in its directory, too."""
    data, end = bytearray(data), header_end(data)
    for _ in range(random.randint(1, 3)):
        where = random.choice([(0, end), (0, 64), (max(len(data) - 3000, 0), len(data)), (0, len(data))])
        at = min(random.randrange(*where), len(data) - 1)
        kind = random.randrange(7)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at] = random.choice(b'0123456789[]{}",:-e')
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", random.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1]))
        elif kind == 3:
            data[at : at + random.randrange(1, 40)] = b""
        elif kind == 4:
            data[at:at] = data[at : at + random.randrange(1, 200)]
        elif kind == 5:
            data[at:at] = random.choice([b"99999999999", b"-1", b"[[[[", b'"', b"\x00" * 9, b"R", b"0", b"(dQ"])
        else:
            del data[max(at, 1) :]
    return bytes(data)


NAMES = ["base.safetensors", "control.safetensors", "difference.safetensors", "diffusers", "zip.ckpt", "legacy.ckpt"]


@pytest.mark.parametrize("name", NAMES)
def test_random_damage(files, unet, tmp_path, name):
    path, generator = tmp_path / name, random.Random(name)
    path.write_bytes(files[name])
    assert name == "base.safetensors" or outcome(path, unet) is None  # whole, it loads
    refused = 0
    with limited_memory():
        for _ in range(MUTATIONS):
            path.write_bytes(mutated(files[name], generator))
            refused += outcome(path, unet) is not None
    assert refused > MUTATIONS / 4


class limited_memory:
    """An allocation of some gigabytes fails inside, as a MemoryError or RuntimeError that no one catches."""

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        if sys.platform == "linux":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self.before)


# ---------------------------------------------------------------------------------------------- made on purpose


def safetensors_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
HINT = "control_model.input_hint_block.0.weight"
LIES = {
    "header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "header of 2^64 bytes": b"\xff" * 8 + b"{}",
    "no tensors": safetensors_file({}),
    "a shape too large": safetensors_file({HINT: entry(shape=(2**39, 2**39))}, bytes(8)),
    "a million dimensions": safetensors_file({HINT: entry(shape=[1] * 10**6)}, bytes(8)),
    "a negative size": safetensors_file({HINT: entry(shape=(-2, -1))}, bytes(8)),
    "sizes that are not numbers": safetensors_file({HINT: entry(shape=(True, "2"))}, bytes(8)),
    "beyond the file": safetensors_file({HINT: entry(offsets=(800, 808))}, bytes(8)),
    "backwards": safetensors_file({HINT: entry(offsets=(8, 0))}, bytes(8)),
    "two tensors in one place": safetensors_file({HINT: entry(), "b": entry()}, bytes(8)),
    "a hole": safetensors_file({HINT: entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "bytes left over": safetensors_file({HINT: entry()}, bytes(9)),
    "a key twice": safetensors_file(b'{"a":1,"a":2}'),
    "an unknown type": safetensors_file({HINT: entry(dtype="F3")}, bytes(8)),
    "no tensor": safetensors_file({HINT: 3}),
    "deep JSON": safetensors_file(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "deep lists": safetensors_file(b"[" * 500_000),
    "a number of a million digits": safetensors_file(b'{"a":' + b"9" * 10**6 + b"}"),
    "no UTF-8": safetensors_file(b'{"\xff":1}'),
    "metadata of the wrong kind": safetensors_file({"__metadata__": {"config": 3}, HINT: entry()}, bytes(8)),
    "a list": safetensors_file([1, 2]),
    "a scalar": safetensors_file({"x.attn2.to_k.weight": entry(shape=(), offsets=(0, 4))}, bytes(4)),
    "a scalar for a matrix": safetensors_file({CONTEXT: entry(shape=(), offsets=(0, 4))}, bytes(4)),
    "zero times huge": safetensors_file({HINT: entry(shape=(0, 2**39, 2**39), offsets=(0, 0))}),
    "zero times huge in its context": safetensors_file({CONTEXT: entry(shape=(0, 2**62), offsets=(0, 0))}),
    "100,000 tensors": safetensors_file(
        {f"{HINT}{i}": entry((), (i, i + 1), "U8") for i in range(100_000)}, bytes(100_000)
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_in_the_header(unet, tmp_path, name):
    path = tmp_path / "file.safetensors"
    path.write_bytes(LIES[name])
    with limited_memory():
        assert outcome(path, unet) is not None


LIES_OF_JSON = (
    10**12,
    -1,
    "%3000000000s",
    "text",
    None,
    [10**12] * 3,
    [1] * 10**4,
    {"a": 1},
    float("nan"),
    True,
    [["x"]],
)


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_lies_in_diffusers_configurations(tmp_path, unet):
    """Types before arithmetic: in each value of each file of a folder."""
    StableDiffusion(SPECK).save(tmp_path / "folder", layout="diffusers")
    weights = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.clone() for key, value in load_file(weights).items()}, weights)  # without our metadata
    assert outcome(tmp_path / "folder", unet) is None
    honest = identify(open_checkpoint(tmp_path / "folder")).config
    refused = count = 0
    generator = random.Random(0)
    for file in (tmp_path / "folder").glob("*/*config.json"):
        if file.parent.name == "tokenizer":
            continue
        text = file.read_text()
        for name in json.loads(text):
            lie = generator.choice([*LIES_OF_JSON, nested(900)])
            file.write_text(json.dumps({**json.loads(text), name: lie}))
            with limited_memory():
                refused += outcome(tmp_path / "folder", unet, count % 4 == 0, honest) is not None
            count += 1
        file.write_text(text)
    assert refused > 0.3 * count  # most of what diffusers writes is not read


def test_configurations_of_diffusers_that_are_none(tmp_path, unet):
    """All are read alike: the UNet's stands for the others."""
    StableDiffusion(SPECK).save(tmp_path, layout="diffusers")
    file = tmp_path / "unet" / "config.json"
    for lie in ("[]", '{"a":' * 3000, "9" * 10**5, "\0", '{"sample_size": 1e400}'):
        file.write_text(lie)
        refused = outcome(tmp_path, unet, described=False) is not None
        assert refused or "sample_size" in lie  # which nobody reads
    with open(file, "r+b") as sparse:
        sparse.truncate(6 * 10**9)
    with limited_memory():
        assert "has 6000000000 bytes, expected at most" in outcome(tmp_path, unet, described=False)


def config_lies():
    """Our metadata with one value at a time out of all proportion, and one of another type: each in its turn."""
    types = cycle(("text", None, float("nan"), 10**12, [10**12] * 3))
    for part, values in SPECK.to_dict().items():
        for name, value in values.items() if isinstance(values, dict) else ():
            proportions = ([10**12] * 3, [1] * 10**4) if isinstance(value, tuple) else (10**12, -1)
            for lie in (*proportions, next(types)):
                yield {**SPECK.to_dict(), part: {**values, name: lie}}


def test_lies_about_the_architecture(files, tmp_path, unet):
    """They are noticed before a model of that size is built."""
    data, path = files["base.safetensors"], tmp_path / "file.safetensors"
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    refused = count = 0
    with limited_memory():
        for config in config_lies():
            header["__metadata__"]["config"] = json.dumps(config)
            path.write_bytes(safetensors_file(header, data[end:]))
            refused += outcome(path, unet, count % 4 == 0, SPECK) is not None
            count += 1
    assert refused > 0.9 * count  # some lies do no harm: a resolution, a larger table of times


class Payload:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def programs(marker):
    """Pickles that would leave a file behind if anything in them were run, or take all memory."""
    touch = f"open({str(marker)!r}, 'w')"
    opcodes = b"\x80\x02cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    yield pickle.dumps({"state_dict": {"a": Payload(os.system, f"touch {marker}")}})
    yield pickle.dumps({"state_dict": {"a": Payload(eval, touch)}}, protocol=2)
    yield pickle.dumps({"state_dict": {"a": Payload(exec, touch)}}, protocol=4)
    yield pickle.dumps({"a": Payload(open, str(marker), "w")}, protocol=0)
    yield opcodes
    yield b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n."  # INST
    yield b"(cos\nsystem\nS'touch " + str(marker).encode() + b"'\no."  # OBJ
    yield b"\x80\x02cos\nsystem\nq\x00}(X\x01\x00\x00\x00ah\x00ub."  # BUILD
    yield pickle.dumps({"a": Payload(bytearray, 10**13)})
    yield pickle.dumps({"a": Payload(range, 10**13)})
    yield b"\x80\x02]r\xff\xff\xff\x7f."  # a memo of two thousand million entries
    yield b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."  # bytes without end
    yield b"\x80\x02" + b"(" * 20_000 + b"t" * 20_000 + b"."  # deep tuples
    yield b"\x80\x02}" + b"(" * 20_000 + b"t" * 20_000 + b"K\x01s."  # as a key: to be hashed
    yield b"\x80\x02K\x01."
    yield b"."
    yield b""


def archive(program):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zip_file:
        zip_file.writestr("archive/data.pkl", program)
        zip_file.writestr("archive/version", b"3\n")  # without which PyTorch reads nothing
    return buffer.getvalue()


def legacy(program):
    start = b"".join(pickle.dumps(v, protocol=2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return start + program + pickle.dumps([], protocol=2)


@pytest.mark.parametrize("form", [archive, legacy], ids=["zip", "legacy"])
def test_pickles_that_run_code(unet, tmp_path, form):
    marker, path = tmp_path / "executed", tmp_path / "file.ckpt"
    for i, program in enumerate(programs(marker)):
        path.write_bytes(form(program))
        with limited_memory():
            sentence = outcome(path, unet)
        assert sentence is not None and not marker.exists(), program[:80]
        if program.startswith(b"\x80\x04"):
            assert "pickle protocol 4, and PyTorch reads weights of protocol 2 alone: if you trust it" in sentence
        elif i < 8:
            assert "which no checkpoint needs: nothing in it was run" in sentence, sentence


CALL = {
    name: b"c" + name.replace(".", "\n", 1).encode() + b"\n"
    for name in (
        "collections.OrderedDict",
        "builtins.set",
        "collections.Counter",
        "_codecs.encode",
        "builtins.bytearray",
    )
} | {
    name: f"c{module}\n{name}\n".encode()
    for module, name in (
        ("torch", "FloatTensor"),
        ("torch", "FloatStorage"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._tensor", "_rebuild_from_type_v2"),
    )
}


def word(text):
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def endless_programs():
    """Each is a small program of allowed instructions that takes all memory, all of the stack or, longer, hours."""
    deep, doubled = b")" + b"\x85" * 150_000, b")" + b"q\x00h\x00\x86" * 60
    nones = b"](" + b"N" * 10_000 + b"eq\x00"
    colliding = [number(i * (2**61 - 1)) for i in range(1, 12_000)]
    storage = b"(" + word("storage") + CALL["FloatStorage"]
    for key in (deep, doubled):
        yield "as a key", b"}" + key + b"Ns."
        yield "as one of many keys", b"}(" + word("a") + b"N" + key + b"Nu."
        yield "as a storage", b"}" + word("a") + storage + key + word("cpu") + b"K\x04tQs."
        yield "in a set", CALL["builtins.set"] + b"](" + key + b"e\x85R."
        yield "called", key + b")R."
        yield "made", key + b")\x81."
    for name in ("collections.OrderedDict", "builtins.set", "collections.Counter"):
        yield f"copies by {name}", b"(" + nones + (CALL[name] + b"h\x00\x85R") * 1000 + b"t."
        yield f"collisions in {name}", CALL[name] + b"](" + b"".join(colliding) + b"e\x85R."
    yield (
        "copies with a list of arguments",
        b"(" + nones + b"](h\x00eq\x01" + (CALL["builtins.set"] + b"h\x01R") * 999 + b"t.",
    )
    yield "colliding keys", b"}(" + b"".join(key + b"N" for key in colliding) + b"u."
    state = b"}(" + b"".join(word(f"a{i}") + b"N" for i in range(8_000)) + b"uq\x00"
    yield "copied states", b"(" + state + (CALL["collections.OrderedDict"] + b")Rh\x00b") * 1000 + b"t."
    punycode = word("".join(chr(0x100 + 7919 * i % 40_000) for i in range(60_000))) + word("punycode") + b"\x86"
    yield "a slow encoding", CALL["_codecs.encode"] + punycode + b"R."
    hidden = CALL["_codecs.encode"] + CALL["builtins.set"] + punycode + b"}"
    yield "a slow encoding within", CALL["_rebuild_from_type_v2"] + b"(" + hidden + b"tR."
    yield "bytes", b"(" + (CALL["builtins.bytearray"] + b"J\xff\xff\xff\x7f\x85R") * 10 + b"t."
    yield "numbers in shared lists", shared_lists(40, 2, b"K\x01K\x01") + CALL["FloatTensor"] + b"h\x28\x85Rs."
    yield "large lists in each other", shared_lists(3, 1000, b"N" * 1000) + b"h\x03s."
    yield "empty lists in each other", shared_lists(3, 1000, b"") + b"h\x03s."
    yield "a list in itself", b"}" + word("a") + b"]q\x00(" + b"h\x00" * 3000 + b"es."


def shared_lists(levels, width, innermost):
    """Each holds the one before it `width` times; the next value gets the key "a" of the outermost dictionary."""
    lists = b"".join(b"]q%c(" % i + (b"h%c" % (i - 1) * width if i else innermost) + b"e" for i in range(levels + 1))
    return b"}" + word("lists") + b"(" + lists + b"ts" + word("a")


@pytest.mark.parametrize("form", [archive, legacy], ids=["zip", "legacy"])
def test_pickles_without_end(unet, tmp_path, form):
    path = tmp_path / "file.ckpt"
    programs = list(endless_programs())
    for name, program in programs if form is archive else programs[::5]:
        path.write_bytes(form(b"\x80\x02" + program))
        with limited_memory():
            sentence = outcome(path, unet)
        harmless = "in each other" in name or "in itself" in name  # for whoever looks into each list once
        assert ("holds no ControlNet" if harmless else "nothing in it was run") in sentence, name


def test_a_pickle_has_only_so_many_instructions(unet, tmp_path, monkeypatch):
    assert pickle_scan.MOST_INSTRUCTIONS == 500_000
    monkeypatch.setattr(pickle_scan, "MOST_INSTRUCTIONS", 5000)
    (tmp_path / "file.ckpt").write_bytes(archive(b"\x80\x02(" + b"N" * 6000 + b"t."))
    assert "asks for more than 5000 instructions, which" in outcome(tmp_path / "file.ckpt", unet)


def test_storage_names_without_end(unet, tmp_path):
    """They follow the objects in files from before PyTorch 1.6."""
    path = tmp_path / "file.ckpt"
    objects, names = pickle.dumps({}, protocol=2), b"\x80\x02](" + b")" + b"q\x00h\x00\x86" * 60 + b"e."
    path.write_bytes(legacy(objects).removesuffix(pickle.dumps([], protocol=2)) + names)
    assert outcome(path, unet) is not None


def test_large_checkpoints_are_scanned_in_a_moment(tmp_path):
    """1,000 tensors, the optimizer's state of each, and a megabyte of numbers."""
    path = tmp_path / "file.ckpt"
    zero = torch.zeros(1)  # of one storage, each a tensor of its own
    weights = {f"model.diffusion_model.{i}.weight": zero[:] for i in range(1000)}
    states = {i: {"step": i, "exp_avg": zero[:], "exp_avg_sq": zero[:]} for i in range(1000)}
    for new in (True, False):
        values = {
            "state_dict": weights,
            "optimizer_states": [{"state": states}],
            "numbers": np.arange(10**6, dtype="u1"),
        }
        torch.save(values, path, _use_new_zipfile_serialization=new)
        started = time.process_time()
        assert open_checkpoint(path).keys == weights.keys()
        assert time.process_time() - started < 2


def test_the_payloads_would_run(tmp_path):
    """The test above means something: PyTorch's old default runs this one."""
    path = tmp_path / "file.ckpt"
    torch.save({"a": Payload(os.mkdir, str(tmp_path / "executed"))}, path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").is_dir()


# (offset, shape, strides) that a pickle's own instructions can make up.
STORAGE_LIES = (
    (0, (2**20, 2**20), (1, 1)),
    (0, (2**39,), (0,)),
    (2**39, (1,), (1,)),
    (-1, (2,), (1,)),
    (0, (2, 2), (1,)),
    (0, (-1,), (1,)),
    (0, (2,), (2**39,)),
    ("0", (2,), (1,)),
)


def test_tensors_beyond_their_storage(tmp_path):
    path = tmp_path / "file.ckpt"
    torch.save({HINT: torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as whole:
        records = {name: whole.read(name) for name in whole.namelist()}
    program = next(name for name in records if name.endswith("data.pkl"))
    for lie in STORAGE_LIES:
        told = [pickletools.optimize(pickle.dumps(part, protocol=2))[2:-1] for part in lie]
        # The offset 0, the shape (4,) and the strides (1,), as PyTorch writes them; the last two are kept in its memo.
        honest = re.compile(rb"K\x00K\x04\x85(q.)K\x01\x85(q.)", re.DOTALL)
        changed = honest.sub(lambda m, told=told: told[0] + told[1] + m[1] + told[2] + m[2], records[program])
        assert changed != records[program]
        with zipfile.ZipFile(path, "w") as archive_file:
            for name, data in {**records, program: changed}.items():
                archive_file.writestr(name, data)
        with limited_memory(), pytest.raises(CheckpointError, match="pickle makes no sense|reaches beyond its data"):
            open_checkpoint(path)
