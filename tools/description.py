"""What tools.describe finds out about checkpoints. Facts are in the order in which they are shown."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from controlnet import ControlNet
from controlnet.layouts import ControlFile, context_widths, recognise_control
from ldm import StableDiffusion
from ldm.checkpoints.key_maps import encoder_length
from ldm.checkpoints.kinds import CONTROL, FAMILIES, kind
from ldm.checkpoints.load import IGNORED, IGNORED_BESIDE_BASE, PARTS, check_keys, is_finite, without_weights
from ldm.checkpoints.open import Checkpoint, open_checkpoint
from ldm.checkpoints.recognise import BaseFile, described_config, identify, is_base
from ldm.checkpoints.stored import CheckpointError, counted
from ldm.config import Config, UNetConfig
from tools.checkpoints import control_unet_config, find_model

DIFFERENCES = {  # by what a ControlNet needs its base for
    "difference": "its copy of the encoder is stored minus the base's",
    "low rank": "its copy of the encoder is stored as changes of low rank to the base's (a Control-LoRA)",
}
LAYOUTS = {"ldm": "original", "diffusers": "diffusers", "state": "our own names, as in a state of train.py"}
STATE_PARTS = {"average.": "moving average (EMA)", "decoder.": "UNet's decoder"}  # as PARTS, beside a run's ControlNet
READ_ANYWAY = 64_000_000  # bytes: all numbers of smaller files are read, also without --values

Facts = dict[str, object]  # as JSON can have them


@dataclass(frozen=True)
class Contents:
    """What a file holds, by its headers alone."""

    kind: str  # "base", "ControlNet", "base with a ControlNet", or a word for what it is
    base: BaseFile | None = None
    control: ControlFile | None = None
    problem: str | None = None  # why a base or a ControlNet that is there cannot be used


def contents(checkpoint: Checkpoint, preset: Config | None = None) -> Contents:
    """`preset` as `find` knows it by the file's name.

    Never raises for a file that could be opened: what is not a model is described as `kind`.
    """
    base, bad_base = attempt(identify, checkpoint, None, False, preset)
    control, bad_control = attempt(recognise_control, checkpoint)
    if base or control:
        names = [name for name, found in (("base", base), ("ControlNet", control)) if found]
        return Contents(" with a ".join(names), base, control)
    if is_base(checkpoint):  # by its keys, but not by its sizes or its description
        return Contents("base", problem=bad_base)
    what = kind(checkpoint)
    return Contents("ControlNet", problem=bad_control) if what == CONTROL else Contents(what)


def attempt(function, *arguments):
    """-> what the function returns, or None, and why it does not."""
    try:
        return function(*arguments), None
    except CheckpointError as error:
        return None, str(error)


def facts_of(name: str, values: bool, keys: bool) -> Facts:
    """What is known of one file. Raises CheckpointError for a file that cannot be read."""
    path, preset = find_model(name)
    checkpoint = open_checkpoint(path)
    found = contents(checkpoint, preset)
    model = found.base or found.control
    control_unet, problem, left_out = None, found.problem, set()
    try:
        control_unet = control_unet_config(checkpoint, found.control) if found.control else None
        left_out = check_fit(checkpoint, found, control_unet)
    except CheckpointError as error:
        problem = str(error)
    size = sum(file.stat().st_size for file in {tensor.path for tensor in checkpoint.tensors.values()})
    widths = context_widths(checkpoint)
    family = FAMILIES.get(widths[0]) if widths else None
    facts = {
        "file": str(path),
        "bytes": size,
        "kind": found.kind,
        "family": family if model else None,
        "layout": LAYOUTS[model.layout] if model else None,
        **(base_facts(found.base) if found.base else {}),
        **(control_facts(checkpoint, found.control, control_unet) if found.control else {}),
        "not_usable": problem,
        "left_out": sorted(left_out),
        "goes_with": None if problem else goes_with(found, family or "the same architecture"),
        **number_facts(checkpoint, found),
        "EMA": "of the UNet, beside its weights" if checkpoint.any_key("model_ema.") else None,
        **(value_facts(checkpoint) if values or size <= READ_ANYWAY else {"values": "not read (--values reads them)"}),
        "metadata": checkpoint.metadata,
    }
    if keys:
        facts["tensors"] = tensor_facts(checkpoint)
    return {name: fact for name, fact in facts.items() if fact not in (None, {}, [])}


def number_facts(checkpoint: Checkpoint, found: Contents) -> Facts:
    """How many floating-point numbers there are, by part and by type."""
    parts = PARTS | STATE_PARTS if found.control and found.control.layout == "state" else PARTS
    rest = "ControlNet" if found.control and not found.base else "other"
    by_part, by_type = Counter(), Counter()
    for key, tensor in checkpoint.tensors.items():
        if tensor.dtype.is_floating_point and key not in IGNORED:
            part = next((part for start, part in parts.items() if key.startswith(start)), rest)
            by_part[part] += tensor.numel
            by_type[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    return {"parameters": dict(by_part), "precision": dict(by_type)}


def check_fit(checkpoint: Checkpoint, found: Contents, control_unet: UNetConfig | None) -> set[str]:
    """-> what loading leaves out. Raises CheckpointError where loading would, by keys and shapes."""
    left_out = set()
    if found.base:
        with without_weights():
            sd = StableDiffusion(found.base.config)
        left_out |= check_keys(checkpoint, sd.parts_in(checkpoint), IGNORED_BESIDE_BASE)
    if found.control:
        left_out |= ControlNet.check(checkpoint, found.control, control_unet)
    return left_out


def base_facts(base: BaseFile) -> Facts:
    return {
        "architecture": base.config.name,
        "resolution": base.config.resolution,
        "prediction": base.config.schedule.prediction,
        "zero_terminal_SNR": "yes" if base.config.schedule.zero_terminal_snr else None,
        "known_from": base.prediction_source,
    }


def control_facts(checkpoint: Checkpoint, control: ControlFile, unet: UNetConfig | None) -> Facts:
    described = "control" in (described_config(checkpoint) or {})
    pooling = None
    if control.config.global_average_pooling:
        pooling = "residuals are averaged over the image (a shuffle model)"
    elif not described and not (control.layout == "diffusers" and checkpoint.configs):
        pooling = "none, but the file could not say so: if it is a shuffle model, pass --control-mode shuffle"
    norms = zero_convolutions(checkpoint, control, unet) if unet else {}
    untrained = norms and all(norm == 0 for norm in norms.values())
    return {
        "hint_channels": control.config.hint_channels,
        "difference": DIFFERENCES.get(control.needs_base),
        "pooling": pooling,
        "zero_convs": norms,
        "training": "not trained: all its zero convolutions are zero" if untrained else None,
    }


def zero_convolutions(checkpoint: Checkpoint, control: ControlFile, unet: UNetConfig) -> dict[str, float | None]:
    """The norm of each one's weights, in the encoder's order; None where it is missing or not finite."""
    modules = {"hint": f"hint_encoder.convs.{len(control.config.hint_widths)}"}
    if control.config.architecture != "concat":
        modules |= {f"block {i}": f"zero_convs.{i}" for i in range(encoder_length(unet))}
        modules["middle"] = "middle_zero_conv"
    sources = control.key_map(unet).sources(f"{module}.weight" for module in modules.values())
    norms = {}
    for name, module in modules.items():
        tensor = checkpoint.tensors.get(sources[f"{module}.weight"].key)
        norm = tensor.load(torch.float32).norm().item() if tensor else math.nan
        norms[name] = norm if math.isfinite(norm) else None
    return norms


def goes_with(found: Contents, family: str) -> str | None:
    if found.base and found.control:
        return f"each other: pass it as --base and as --control; also with other models of {family}"
    if found.base and found.base.config.unet.inpainting:
        return f"ControlNets of {family}, to fill what is masked: pass it as --base, with --init and --mask"
    if found.base:
        return f"ControlNets of {family}: pass it as --base"
    if found.control and found.control.needs_base:
        return f"any base of {family}, to which it is added when loaded: pass it as --control"
    if found.control:
        return f"bases of {family}, best the one it was trained on: pass it as --control"
    return None


def value_facts(checkpoint: Checkpoint) -> Facts:
    bad = []
    for key, tensor in bar(checkpoint.tensors.items()):
        if tensor.dtype.is_floating_point:
            dtype = tensor.dtype if tensor.dtype.itemsize > 1 else torch.float16  # PyTorch cannot compute in 8 bits
            if not is_finite(tensor.load(dtype)):
                bad.append(key)
    return {"values": f"NaN or infinite in {counted(len(bad), 'tensor')}" if bad else "all finite", "not_finite": bad}


def bar(items: Iterable) -> tqdm:
    return tqdm(items, "reading", unit="tensor", leave=False, disable=None)


def tensor_facts(checkpoint: Checkpoint) -> dict[str, str]:
    tensors = sorted(checkpoint.tensors.items())
    return {key: f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for key, tensor in tensors}


def differences(first_name: str, second_name: str, values: bool) -> dict[str, list[str]]:
    """What differs -> a line for each tensor or metadata entry. Numbers are compared only with `values`."""
    first, second = (open_checkpoint(find_model(name)[0]) for name in (first_name, second_name))
    ours, theirs = (
        tensor_facts(checkpoint) | {f"metadata {name}": text for name, text in sorted(checkpoint.metadata.items())}
        for checkpoint in (first, second)
    )
    found = {
        f"only in {first.path}": [name for name in ours if name not in theirs],
        f"only in {second.path}": [name for name in theirs if name not in ours],
        "different": [
            f"{name}: {ours[name]}, {theirs[name]}" for name in ours if ours[name] != theirs.get(name, ours[name])
        ],
        "numbers": [],
    }
    for key in bar(sorted(first.keys & second.keys) if values else ()):
        if first.shape(key) == second.shape(key):
            a, b = (checkpoint.tensors[key].load(torch.float64) for checkpoint in (first, second))
            unlike = ~((a == b) | (a.isnan() & b.isnan()))
            if unlike.any():
                largest = (a - b)[unlike].abs().max().item()
                found["numbers"].append(f"{key}: {int(unlike.sum()):,} of {a.numel():,}, by up to {largest:.3g}")
    return {what: lines for what, lines in found.items() if lines}
