"""Fills a model with the tensors of a checkpoint, if all of them fit."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .key_maps import SGM_TEXT, KeyMap, names_by_key
from .kinds import made_for, other_use
from .open import Checkpoint
from .stored import CheckpointError, counted, first_few

Parts = Sequence[tuple[nn.Module, KeyMap]]

PARTS = {  # by how their keys begin
    "model.": "UNet",
    "unet.": "UNet",
    "first_stage_model.": "autoencoder",
    "vae.": "autoencoder",
    "cond_stage_model.": "text encoder",
    SGM_TEXT: "text encoder",
    "text_encoder.": "text encoder",
    "control_model.": "ControlNet",
    "controlnet.": "ControlNet",
    "model_ema.": "moving average (EMA)",
}
IGNORED_BESIDE_BASE = ("model_ema.", "control_model.", "controlnet.")  # in one file or one folder with it
BASE_PARTS = tuple(prefix for prefix in PARTS if prefix not in IGNORED_BESIDE_BASE)
AUTOENCODER = tuple(prefix for prefix, part in PARTS.items() if part == "autoencoder")
TOKENS = "token_embedding.weight"  # at the end of a key: the table of the text encoder's tokens

SCHEDULE_BUFFERS = """
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar scale_factor
"""
# Keys that a file may have and no module reads. The schedule's buffers follow from formulas; "difference" and
# "lora_controlnet" mark a ControlNet that is stored as it differs from its base; "v_pred" and "ztsnr" say what a base
# predicts (recognise.py).
IGNORED = {
    *SCHEDULE_BUFFERS.split(),
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    f"{SGM_TEXT}transformer.text_model.embeddings.position_ids",
    "text_encoder.text_model.embeddings.position_ids",
    "difference",
    "lora_controlnet",
    "v_pred",
    "ztsnr",
}


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside are on the meta device: shapes alone, for `load_parts` to fill."""
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    """Meta tensors need no initialisation; drawing numbers for them would cost seconds of imports."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init" or function is Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load_parts(
    checkpoint: Checkpoint,
    parts: Parts,
    ignored: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Fill modules that were built `without_weights`. Nothing is loaded unless everything fits.

    Tensors are read one by one: the peak is the parameters' final memory and one tensor more. Parameters that no
    output depends on are zero where the file lacks them. Warns of weights that are not finite, and of what is left out:
    keys that are neither wanted nor in `IGNORED` nor beginning with any of `ignored`.
    Raises CheckpointError for keys that are missing, of another shape or not of a floating type.
    """
    left_out = check_keys(checkpoint, parts, ignored)
    warn_of_left_out(checkpoint, left_out)
    device, broken = torch.device(device), []
    for module, key_map in parts:
        state = module.state_dict()
        sources = key_map.sources(state)
        for name, like in state.items():
            source = sources.get(name)
            if source is None or source.key not in checkpoint.tensors or source.key in left_out:
                state[name] = torch.zeros(like.shape, dtype=dtype, device=device)
                continue
            stored = checkpoint.tensors[source.key]
            rows = (0, len(like)) if source.key.endswith(TOKENS) else source.rows
            tensor = stored.load(dtype, device, rows)
            if not is_finite(tensor):
                broken.append(source.key)
            if stored.dtype == dtype and device.type == "cpu":
                tensor = stored.load(dtype, device, rows)  # map again, to release the pages the NaN check read
            state[name] = tensor.reshape(like.shape)
        module.load_state_dict(state, assign=True)
    if broken:
        warn_of_broken(checkpoint, broken)


def warn_of_broken(checkpoint: Checkpoint, keys: list[str]) -> None:
    another_vae = all(key.startswith(AUTOENCODER) for key in keys)
    remedy = "give another autoencoder with --vae" if another_vae else "get another copy, if there is one in fp32"
    warnings.warn(
        f'"{checkpoint.tensors[keys[0]].path}" has NaN or infinite numbers in {counted(len(keys), "tensor")}, '
        f"the first in {keys[0]}: expect black or broken images, or {remedy}",
        stacklevel=4,
    )


def warn_of_left_out(checkpoint: Checkpoint, keys: set[str]) -> None:
    """One warning for each file, which may be that of another autoencoder."""
    by_file = defaultdict(list)
    for key in sorted(keys):
        tensor = checkpoint.tensors.get(key) or checkpoint.tensors[key.rpartition("[")[0]]  # "KEY[N:]" is of KEY
        by_file[tensor.path].append(key)
    for path, names in by_file.items():
        count = f" ({len(names)} in all)" if len(names) > 3 else ""
        warnings.warn(f'"{path}" has more than the model reads, left out: {first_few(names)}{count}', stacklevel=4)


def is_finite(tensor: Tensor) -> bool:
    """Minimum and maximum are finite (`aminmax` propagates NaN). One pass, and no memory."""
    return tensor.numel() == 0 or all(map(math.isfinite, tensor.aminmax()))


def wanted_shapes(parts: Parts) -> dict[str, tuple[int, ...]]:
    """Each key that the modules have a place for -> the shape of the whole tensor in the file."""
    shapes = {}
    for module, key_map in parts:
        state = module.state_dict()
        sources = key_map.sources(state)
        for key, names in names_by_key(sources).items():
            shape, last = tuple(state[names[0]].shape), sources[names[-1]]
            if last.matrix:
                shape = shape[:2]
            # The last name's rows are the last of the tensor.
            shapes[key] = shape if last.rows is None else (last.rows[1], *shape[1:])
    return shapes


def check_keys(checkpoint: Checkpoint, parts: Parts, ignored: tuple[str, ...]) -> set[str]:
    """-> what nobody reads and `load_parts` leaves out: keys, and "KEY[N:]" for the rows of a tensor from N on.

    Raises CheckpointError as `load_parts` does.
    """
    wanted, unused = wanted_shapes(parts), keys_of(parts, "unused")
    left_out = {key for key in checkpoint.keys - wanted.keys() - IGNORED if not key.startswith(ignored)}
    missing = wanted.keys() - checkpoint.keys - unused
    if not any(key.startswith(key_map.prefix) for key in left_out for _, key_map in parts):
        missing -= keys_of(parts, "sparse")  # beside strange keys of its own it is not sparse but damaged
    problems = {"missing": sorted(missing), "misshapen": [], "not of a floating-point type": []}
    for key in sorted(checkpoint.keys & wanted.keys()):
        stored, shape = checkpoint.tensors[key], wanted[key]
        well_shaped, floating = fits(key, stored.shape, shape), stored.dtype.is_floating_point
        if key in unused and not (well_shaped and floating):
            left_out.add(key)
        elif not well_shaped:
            problems["misshapen"].append(f"{key} is {list(stored.shape)}, expected {list(shape)}")
        elif not floating:
            problems["not of a floating-point type"].append(f"{key} is {stored.dtype}")
        elif key.endswith(TOKENS) and stored.shape != shape:
            left_out.add(f"{key}[{shape[0]}:]")
    if any(problems.values()):
        problems["unexpected"] = sorted(left_out)
        each = (f"{counted(len(keys), 'key')} {what} ({first_few(keys)})" for what, keys in problems.items() if keys)
        cause = f"it is damaged, or made for another architecture: {'; '.join(each)}"
        raise CheckpointError(f'"{checkpoint.path}" does not fit, {likely_cause(checkpoint, wanted, missing) or cause}')
    return left_out


def keys_of(parts: Parts, which: str) -> set[str]:
    """The keys of the parameters that a key map lists as "unused" or as "sparse"."""
    return {
        source.key
        for module, key_map in parts
        for name, source in key_map.sources(module.state_dict()).items()
        if name.startswith(getattr(key_map, which))
    }


def fits(key: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """A text encoder may have learned more tokens than the tokenizer makes: their rows come last, and are not read."""
    if key.endswith(TOKENS):
        return shape[1:] == wanted[1:] and shape[0] >= wanted[0]
    return as_matrix(shape) == as_matrix(wanted)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a linear layer are the same, and files have either."""
    return shape[:2] if shape[2:] == (1, 1) else shape


FIRST_CONVOLUTIONS = ("input_blocks.0.0.weight", "unet.conv_in.weight")  # also of a ControlNet


def likely_cause(checkpoint: Checkpoint, wanted: dict[str, tuple], missing: set[str]) -> str | None:
    """Why a file does not fit, where one reason explains all of it. `wanted` are shapes by key."""
    for key, expected in wanted.items():
        shape = checkpoint.shape(key) if key in checkpoint.tensors else ()
        if key.endswith("attn2.to_k.weight") and len(shape) == 2 and shape[1] != expected[1]:
            return f"it is {made_for(shape[1])}, expected {made_for(expected[1])}: give files of one family"
        if key.endswith(FIRST_CONVOLUTIONS) and len(shape) == 4 and shape[1] != expected[1] == 4:
            return f"it is {other_use(shape[1])}"
    absent = []
    for prefix, part in PARTS.items():
        keys = {key for key in wanted if key.startswith(prefix)}
        if keys and keys <= missing:
            absent.append(part)
    if not absent:
        return None
    complete = "get the complete version of the model"
    remedy = "give one with --vae FILE" if absent == ["autoencoder"] else complete
    return f"it has no {' and no '.join(absent)} (or another one), expected a whole checkpoint: {remedy}"
