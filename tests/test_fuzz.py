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
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from controlnet.config import ControlConfig
from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.stored import CheckpointError
from ldm.config import Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.unet import UNet
from tools.checkpoints import contents

MUTATIONS = 300  # of each file
SLOW = 5.0  # seconds of computing that no file may take

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


def outcome(path, unet):
    """What becomes of a file: the sentence that refuses it, or None. Anything else raises."""
    started = time.process_time()
    sentence = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checkpoint = open_checkpoint(path)
            contents(checkpoint)
            if checkpoint.any_key("model.diffusion_model.") or checkpoint.any_key("unet."):
                StableDiffusion.load(path)
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


HINT = "control_model.input_hint_block.0.weight"
LIES = {
    "header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "header of 2^64 bytes": b"\xff" * 8 + b"{}",
    "no tensors": safetensors_file({}),
    "a shape too large": safetensors_file({HINT: entry(shape=(2**39, 2**39))}, bytes(8)),
    "a million dimensions": safetensors_file({HINT: entry(shape=[1] * 10**6)}, bytes(8)),
    "a negative size": safetensors_file({HINT: entry(shape=(-2, -1))}, bytes(8)),
    "sizes that are no numbers": safetensors_file({HINT: entry(shape=(True, "2"))}, bytes(8)),
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
}


@pytest.mark.parametrize("name", LIES)
def test_lies_in_the_header(unet, tmp_path, name):
    path = tmp_path / "file.safetensors"
    path.write_bytes(LIES[name])
    with limited_memory():
        assert outcome(path, unet) is not None


def config_lies():
    """Our metadata with one number at a time out of all proportion."""
    for part, values in SPECK.to_dict().items():
        for name in values if isinstance(values, dict) else ():
            for lie in (10**12, -1, "text", None, [10**12] * 3, [1] * 10**4, float("nan")):
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
            refused += outcome(path, unet) is not None
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
        if i < 8:
            assert "which no checkpoint needs: nothing in it was run" in sentence, sentence


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
