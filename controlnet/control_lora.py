"""Control-LoRA: a ControlNet in a file of a quarter of its size, as changes of low rank to the encoder of its base.

The format of Stability AI and of ComfyUI, in which ControlNet 1.1 is published, too. A matrix or a convolution of the
encoder is the base's plus the product of "up" and "down". What stands there whole is the control's own (hint encoder,
zero convolutions, norms, biases), and what does not stand there at all is as in the base.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ldm.checkpoints.key_maps import KeyMap
from ldm.checkpoints.open import Checkpoint
from ldm.checkpoints.stored import CheckpointError, StoredTensor

MARK = "lora_controlnet"  # a tensor without numbers


def with_encoder(checkpoint: Checkpoint, key_map: KeyMap, encoder: Mapping[str, Tensor]) -> Checkpoint:
    """The whole ControlNet as `load_parts` reads it, from that of a Control-LoRA. `encoder` are its base's parameters
    by their names in a ControlNet.

    Raises CheckpointError for changes of another shape.
    """
    tensors = dict(checkpoint.tensors)
    for name, source in key_map.sources(encoder).items():
        weight, stem = encoder[name], source.key.removesuffix(".weight")
        factors = [tensors.pop(f"{stem}.{factor}", None) for factor in ("up", "down")]
        if source.key in tensors:
            continue
        if factors != [None, None]:
            check_factors(checkpoint, stem, factors, weight.shape)
        else:
            factors = []
        view = partial(changed, weight, factors)
        tensors[source.key] = StoredTensor(checkpoint.path, torch.float32, tuple(weight.shape), view)
    return replace(checkpoint, tensors=tensors)


def check_factors(checkpoint: Checkpoint, stem: str, factors: list[StoredTensor | None], shape: torch.Size) -> None:
    """Raises CheckpointError unless the product is a weight of `shape`, all sides but the first taken as one."""
    up, down = (factor.shape if factor else () for factor in factors)
    if len(up) > 1 and len(down) > 1:
        product = up[0], math.prod(down[1:])
        if math.prod(up[1:]) == down[0] and product == (shape[0], math.prod(shape[1:])):
            return
    raise CheckpointError(
        f'"{checkpoint.path}" does not fit: {stem}.up is {list(up)} and {stem}.down {list(down)}, expected a product '
        f"of {list(shape)}; it is damaged, or made for another architecture"
    )


def changed(weight: Tensor, factors: list[StoredTensor]) -> Tensor:
    """A new tensor, in fp32."""
    weight = weight.detach().to("cpu", torch.float32, copy=True)
    if factors:
        up, down = (factor.view().float().flatten(1) for factor in factors)  # (O, R), (R, I k k)
        weight += (up @ down).reshape(weight.shape)
    return weight
