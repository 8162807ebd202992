"""Opens a checkpoint without reading its weights: safetensors, PyTorch's pickles, and folders in diffusers' layout.

Every error that a file can cause is a `CheckpointError` of one sentence.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from .folders import read_folder
from .published import as_path
from .read import read_config, read_tensors
from .spellings import respelled
from .stored import CheckpointError, StoredTensor

# How keys begin in diffusers' file of a UNet, a ControlNet or an autoencoder alone, beside which is its config.json.
COMPONENT_ALONE = ("down_blocks.", "controlnet_cond_embedding.", "decoder.mid_block.")


@dataclass(frozen=True)
class Checkpoint:
    """An open file or folder. Only its headers have been read."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    # Diffusers' configurations: by subfolder ("unet", "scheduler" ...), "" for the file or folder itself, and
    # "pipeline" for the model_index.json.
    configs: dict[str, dict] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        return set(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.tensors[key].shape

    def any_key(self, start: str) -> bool:
        return any(key.startswith(start) for key in self.tensors)

    def with_ema(self) -> "Checkpoint":
        """With the EMA of the UNet's weights in place of the weights. Raises CheckpointError if the file has none.

        It is stored under the UNet's names without their dots: `model_ema.diffusion_modelout2bias`.
        """
        averages = {
            key: self.tensors.get("model_ema." + key.removeprefix("model.").replace(".", ""))
            for key in self.tensors
            if key.startswith("model.diffusion_model.")
        }
        if not averages or None in averages.values():
            raise CheckpointError(f'"{self.path}" has no (complete) moving average of its UNet: load its plain weights')
        return replace(self, tensors={**self.tensors, **averages})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A .safetensors file, a pickle (.ckpt, .pth, .pt, .bin) or a folder in diffusers' layout.

    Raises CheckpointError if there is no such file, or if it is of another kind, incomplete, or wants to run code.
    """
    path = as_path(path)
    try:
        if path.is_dir():
            return Checkpoint(path, *read_folder(path))
        tensors, metadata = read_tensors(path)
        tensors = respelled(tensors, "", path)
        config = path.parent / "config.json"
        alone = any(key.startswith(COMPONENT_ALONE) for key in tensors)
        configs = {"": read_config(config)} if alone and config.is_file() else {}
        return Checkpoint(path, tensors, metadata, configs)
    except OSError as error:
        raise CheckpointError(f'"{path}" cannot be read ({error.strerror}): give a file that you may read') from error
