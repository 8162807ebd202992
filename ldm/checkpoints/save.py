"""Writes a network's tensors under the keys of a layout, as safetensors, whole or not at all."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import new_file
from .key_maps import KeyMap, names_by_key


def gather(module: nn.Module, key_map: KeyMap, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's tensors by the keys of a file, what the file keeps in one tensor joined. `dtype` None keeps theirs."""
    state = module.state_dict()
    sources = key_map.sources(state)
    tensors = {}
    for key, names in names_by_key(sources).items():
        tensor = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        if sources[names[0]].matrix:
            tensor = tensor.flatten(1)
        tensors[key] = tensor.to(dtype or tensor.dtype)
    return tensors


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors as a `new_file`: `path` is never half written.

    Raises OSError if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with new_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as for any new file; safetensors' own are readable by their owner alone
        try:  # other programs look for "format" before they read a file
            save_file(tensors, temporary, {"format": "pt", **metadata})
        except SafetensorError as error:  # of a full disk, for example
            raise OSError(f'"{path}" could not be written ({error})') from error
        temporary.chmod(mode)
