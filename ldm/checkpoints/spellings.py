"""Names of the same tensor: what trainers put before a key, and older or newer spellings -> the one in the key maps."""

import re
from collections.abc import Iterable

from .stored import CheckpointError, StoredTensor

# Modules that wrap others, at any depth of a key: DistributedDataParallel, torch.compile, FSDP, checkpointing.
WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")

# How keys of a base, a ControlNet or an autoencoder begin. Whatever all of a model's keys have before that comes from
# the program that wrote the file: "model.", "params.", "state_dict.net." ...
ROOTS = (
    "model.diffusion_model.",
    "first_stage_model.decoder.",
    "unet.down_blocks.",
    "control_model.input_hint_block.",
    "controlnet.controlnet_cond_embedding.",
    "input_hint_block.",
    "controlnet_cond_embedding.",
    "decoder.conv_in.",
)
OUTER = re.compile(rf"^((?:[\w-]+\.){{0,3}}?)(?:{'|'.join(map(re.escape, ROOTS))})")

SPELLINGS = (
    # Some programs, and transformers since its version 5, leave out a level of the text model.
    (
        re.compile(
            r"^((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.|text_encoder\.)(?=embeddings\.|encoder\.|final_layer)"
        ),
        r"\1text_model.",
    ),
    # The autoencoder's attention, as diffusers named it in its first months.
    *(
        (re.compile(rf"(coder\.mid_block\.attentions\.0\.){old}\."), rf"\1{new}.")
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    ),
)


def respelled(tensors: dict[str, StoredTensor], prefix: str, path: object) -> dict[str, StoredTensor]:
    """With `prefix` in front of every key, and each key in the spelling of the key maps.

    Raises CheckpointError if two keys become one.
    """
    plain = {key: WRAPPERS.sub(r"\1", key) for key in tensors}
    outer = outer_level(plain.values())
    result = {}
    for key, tensor in tensors.items():
        name = prefix + plain[key].removeprefix(outer)
        for pattern, spelling in SPELLINGS:
            name = pattern.sub(spelling, name)
        if name in result:
            raise CheckpointError(f'"{path}" has {name:.160} twice, under two names: make it again from its sources')
        result[name] = tensor
    return result


def outer_level(keys: Iterable[str]) -> str:
    """What stands before the keys of the model in a file; "" if nothing does, or if there are several models in it.

    Of weights and their moving average (params and params_ema, say) the weights count.
    """
    found = {match[1] for match in map(OUTER.match, keys) if match}
    if len(found) > 1 and "" not in found:
        found = {outer for outer in found if "ema" not in outer.lower()} or found
    return found.pop() if len(found) == 1 else ""
