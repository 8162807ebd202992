"""Control-LoRA: a ControlNet in a fifth of its size (at rank 128), as changes of low rank to the encoder of its base.

The format of Stability AI (huggingface.co/stabilityai/control-lora) and of ComfyUI, in which ControlNet 1.1 is
published, too. A matrix or a convolution of the encoder is the base's plus the product of "up" and "down". What stands
there whole is the control's own (hint encoder, zero convolutions, norms, biases), and what does not stand there at all
is as in the base.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ldm.checkpoints.key_maps import KeyMap
from ldm.checkpoints.lora_change import Change, Misshapen
from ldm.checkpoints.open import Checkpoint
from ldm.checkpoints.stored import CheckpointError, StoredTensor

MARK = "lora_controlnet"  # a tensor without numbers


def with_encoder(checkpoint: Checkpoint, key_map: KeyMap, encoder: Mapping[str, Tensor]) -> Checkpoint:
    """A Control-LoRA's file with the weights of a whole ControlNet, for `load_parts` to read. `encoder` are its base's
    parameters by their names in a ControlNet.

    Raises CheckpointError for changes of another shape.
    """
    tensors = dict(checkpoint.tensors)
    for name, source in key_map.sources(encoder).items():
        weight, stem = encoder[name], source.key.removesuffix(".weight")
        keys = {role: f"{stem}.{role}" for role in ("up", "down")}
        factors = {role: tensors.pop(key) for role, key in keys.items() if key in tensors}
        if source.key not in tensors:
            change = change_of(checkpoint, stem, factors, weight) if factors else None
            view = partial(changed, weight, change)
            tensors[source.key] = StoredTensor(checkpoint.path, torch.float32, tuple(weight.shape), view)
    return replace(checkpoint, tensors=tensors)


def change_of(checkpoint: Checkpoint, stem: str, factors: dict[str, StoredTensor], weight: Tensor) -> Change:
    try:
        change = Change.from_tensors(factors)
        change.check(weight)
    except Misshapen as error:
        up, down = (list(factors[role].shape) if role in factors else [] for role in ("up", "down"))
        raise CheckpointError(
            f'"{checkpoint.path}" does not fit: {stem}.up is {up} and {stem}.down {down}, expected a product of '
            f"{list(weight.shape)}; it is damaged, or made for another architecture"
        ) from error
    return change


def changed(weight: Tensor, change: Change | None) -> Tensor:
    """A new tensor, in fp32."""
    weight = weight.detach().to("cpu", torch.float32)
    return weight.clone() if change is None else weight + change.of(weight)
