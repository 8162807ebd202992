"""LoRAs (Hu et al., arXiv 2106.09685), merged into a base's weights when it is loaded: no layer knows of them.

A LoRA holds a change of low rank for some of the weights, W + strength * alpha / rank * up @ down. It goes by several
spellings, which differ in how they name the weight (after diffusers' layout or the original one, with dots or
underscores) and the factors (kohya's `lora_down.weight`, diffusers' `lora.down.weight`, PEFT's `lora_A.weight`).
lora_change.py has the formulas, also of LyCORIS' kinds and of DoRA.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config import Config
from ldm.text_encoder import TextEncoder
from ldm.unet import UNet

from .extras import LORAS, given_extra, split_strength
from .key_maps import clip_rows, diffusers_unet_map, unet_map
from .kinds import IP_ADAPTER, LORA, ONLY, kind, made_for
from .load import is_finite, without_weights
from .lora_change import Change, Misshapen
from .open import Checkpoint, open_checkpoint
from .read import read_json
from .stored import CheckpointError, Damaged, StoredTensor, counted, first_few, parse_json

# How a key ends -> what the tensor is to the change (lora_change.py).
ENDS = (
    (r"[._]lora(?:_linear_layer)?[._](?:down|A)(?:\.default)?(?:\.weight)?", "down"),
    (r"[._]lora(?:_linear_layer)?[._](?:up|B)(?:\.default)?(?:\.weight)?", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"(?:_lora)?\.alpha", "alpha"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", "magnitude"),
    (r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)", None),  # LyCORIS' keys end with the role itself
)
ENDS = tuple((re.compile(f"{pattern}$"), role) for pattern, role in ENDS)

# What stands before the module's own name, once its dots are underscores.
FRONT = re.compile(
    r"^(?:base_model_model_|lora_unet_|lora_te1?_|unet_|text_encoder_|model_|diffusion_model_|text_model_)+"
)
# Diffusers' first spelling, of its attention processors; the text encoder's projections had the UNet's names in it.
PROCESSOR = ((r"_processor_(?=to_)", "_"), (r"(attn[12]_to_out)$", r"\1_0"), (r"(self_attn)_to_(.*)$", r"\1_\2_proj"))

OTHER_FAMILIES = (
    (r"^lora_te2_|text_encoder_2|transformer_blocks[._][1-9]|label_emb|add_embedding", "SDXL"),
    (r"(double|single)_blocks|single_transformer_blocks", "Flux"),
    (r"joint_blocks|^(lora_)?transformer[._]", "SD 3 or another transformer"),
)


@dataclass(frozen=True)
class Lora:
    """One file, whose every tensor has its place in the networks that it was checked for."""

    path: Path
    strength: float
    changes: dict[tuple[nn.Module, str], Change]  # by network and module


def check_loras(names: Sequence[str], config: Config) -> None:
    """Raises CheckpointError as loading a base with them would, from the headers alone."""
    if names:
        with without_weights():
            unet, text_encoder = UNet(config.unet), TextEncoder(config.text)
        read_loras(names, unet, text_encoder)


def read_loras(names: Sequence[str], unet: UNet, text_encoder: TextEncoder) -> list[Lora]:
    """Each of FILE or FILE:STRENGTH, where FILE may be a name in weights/ or weights/loras/. No weights are read.

    Raises CheckpointError if there is no such file, if it is something else or for another family, or if anything in
    it fits nowhere; ValueError for a strength that is not finite, TypeError for names that are not a list of texts.
    """
    if isinstance(names, str | Path) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'loras is {names!r:.80}, expected a list of texts such as ["ink.safetensors:0.8"]')
    modules = modules_by_name(unet, text_encoder)
    loras = []
    for name, strength in map(split_strength, names):
        path = given_extra(name, LORAS, "LoRA")
        loras.append(Lora(path, strength, changes_of(open_checkpoint(path), modules)))
    return loras


@torch.no_grad()
def merge_loras(loras: Sequence[Lora]) -> None:
    """Into the networks that they were read for. Each change is of the base's own weights, all are added up in fp32,
    and the sum is rounded once to the weights' type: the order does not matter.

    Raises CheckpointError for a sum that is not finite; some weights are merged by then.
    """
    changes = defaultdict(list)
    for lora in sorted(loras, key=lambda lora: (lora.path, lora.strength)):  # sums depend on their order, to rounding
        for place, change in lora.changes.items():
            changes[place].append((lora, change))
    for (network, module), several in changes.items():
        weight = network.get_submodule(module).weight
        base = weight.float()
        total = sum(lora.strength * change.of(base) for lora, change in several)
        merged = (base + total).to(weight.dtype)
        if is_finite(weight) and not is_finite(merged):
            files = " and ".join(f'"{lora.path}" (strength {lora.strength:g})' for lora, _ in several)
            raise CheckpointError(
                f"{files} makes {module} infinite or NaN in {str(weight.dtype).removeprefix('torch.')}: give a smaller "
                "strength, or another copy of the file"
            )
        weight.data = merged


# ------------------------------------------------------------------------------------------------------------- reading


def modules_by_name(unet: UNet, text_encoder: TextEncoder) -> dict[str, tuple[nn.Module, str]]:
    """All modules with a weight by their names in both layouts, without a prefix and with "_" for each dot."""
    tables = (
        (unet, unet_map(unet.config).modules),
        (unet, diffusers_unet_map(unet.config).modules),
        (text_encoder, clip_rows(text_encoder.config.layers)),  # trainers know both families by these names
    )
    found = {}
    for network, rows in tables:
        parameters = {name for name, _ in network.named_parameters()}
        found |= {flat(theirs): (network, ours) for ours, theirs in rows if f"{ours}.weight" in parameters}
    return found


def flat(name: str) -> str:
    return name.replace(".", "_")


def module_and_role(key: str) -> tuple[str, str | None]:
    """-> the module's name as in `modules_by_name`, and what the tensor is to it; None for what no LoRA has."""
    for pattern, role in ENDS:
        if end := pattern.search(key):
            name = FRONT.sub("", flat(key[: end.start()]))
            for theirs, ours in PROCESSOR:
                name = re.sub(theirs, ours, name)
            return name, role or end[1]
    return key, None


def changes_of(
    checkpoint: Checkpoint, modules: dict[str, tuple[nn.Module, str]]
) -> dict[tuple[nn.Module, str], Change]:
    """Raises CheckpointError unless everything in the file has one place, of its shape."""
    parts, names, lost = defaultdict(dict), {}, []  # by place: its tensors by role, and its name in the file
    for key, tensor in checkpoint.tensors.items():
        name, role = module_and_role(key)
        place = modules.get(name)
        if role is None or place is None:
            lost.append(key)
            continue
        if role in parts[place]:
            raise CheckpointError(f'"{checkpoint.path}" has the change of {place[1]} twice: make it again')
        parts[place][role], names[place] = tensor, name
    if lost or not parts:
        raise fits_nowhere(checkpoint, sorted(lost))
    settings = described_settings(checkpoint)
    changes = {}
    for (network, module), tensors in parts.items():
        weight = network.get_submodule(module).weight
        described = settings["unet" if isinstance(network, UNet) else "text_encoder"]
        alpha = described_alpha(described, names[network, module])
        try:
            changes[network, module] = Change.from_tensors(tensors, alpha)
            changes[network, module].check(weight)
        except Misshapen as error:
            raise does_not_fit(checkpoint, module, tensors, weight, error) from error
    return changes


def described_settings(checkpoint: Checkpoint) -> dict[str, dict]:
    """By network, the settings of a LoRA, alpha above all: diffusers' in the metadata, or PEFT's in a file beside it.

    Raises CheckpointError if that is not readable, or asks for a scale that is not alpha / rank.
    """
    beside = checkpoint.path.with_name("adapter_config.json")
    try:
        values = parse_json(checkpoint.metadata.get("lora_adapter_metadata", "{}"))
        found = {
            part: {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
            for part in ("unet", "text_encoder")
        }
        if checkpoint.any_key("base_model.") and beside.is_file():
            found = dict.fromkeys(found, read_json(beside))
        for settings in found.values():
            if settings.get("use_rslora"):
                raise Damaged("it asks for rslora, whose scale is another")
            alphas = [settings.get("lora_alpha", 1), *dict(settings.get("alpha_pattern") or {}).values()]
            if not all(isinstance(alpha, int | float) for alpha in alphas):
                raise Damaged("its alpha is not a number")
    except (Damaged, TypeError, ValueError) as error:
        raise CheckpointError(
            f'"{checkpoint.path}" describes itself in a way that is not known ({error!s:.200}): save it as kohya\'s '
            "scripts do"
        ) from error
    return found


def described_alpha(settings: dict, name: str) -> float | None:
    """The alpha of the module with this name; None if nothing says it. PEFT's patterns are ends of names."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if f"_{name}".endswith(f"_{flat(pattern)}"):
            return alpha
    return settings.get("lora_alpha")


# ----------------------------------------------------------------------------------------------------- what is wrong


def fits_nowhere(checkpoint: Checkpoint, lost: list[str]) -> CheckpointError:
    """The error for a file with keys that no LoRA for the base has, or with no others."""
    what = kind(checkpoint)
    if what == IP_ADAPTER or not any(module_and_role(key)[1] for key in checkpoint.tensors):
        what = "of a kind that is not known" if what == LORA else what
        return CheckpointError(f'"{checkpoint.path}" is not a LoRA: it is {what}')
    keys = "\n".join(checkpoint.tensors)
    for pattern, family in OTHER_FAMILIES:
        if re.search(pattern, keys, re.MULTILINE):
            return CheckpointError(f'"{checkpoint.path}" is a LoRA for {family}, and {ONLY}: get one for your base')
    return CheckpointError(
        f'"{checkpoint.path}" is a LoRA, {counted(len(lost), "key")} of which fit nowhere in this base '
        f"({first_few(lost)}): get one for your base"
    )


def does_not_fit(
    checkpoint: Checkpoint, module: str, tensors: dict[str, StoredTensor], weight: Tensor, error: Misshapen
) -> CheckpointError:
    """The error for a change of another shape than its weight's."""
    down = tensors.get("down")
    of_prompts = re.search(r"(cross_attention\.[kv]|\.attention\.[qkv])$", module)  # as wide as the family's context
    if of_prompts and down is not None and len(down.shape) > 1 and down.shape[1] != weight.shape[1]:
        width = down.shape[1]
        found = "SDXL" if width == 2048 else made_for(width)
        return CheckpointError(
            f'"{checkpoint.path}" is a LoRA for {found}, expected {made_for(weight.shape[1])}: give files of one family'
        )
    return CheckpointError(
        f'"{checkpoint.path}" is a LoRA whose change of {module} does not fit its weight of {list(weight.shape)}, '
        f"{error}: it is damaged, or made for another architecture"
    )
