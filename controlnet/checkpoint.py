"""A ControlNet's files: loading, saving, differences to a base, and the move from one base to another."""

import copy
import glob
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch

from ldm import StableDiffusion
from ldm.checkpoints import published
from ldm.checkpoints.diffusers import WEIGHTS_NAME, write_json
from ldm.checkpoints.files import new_folder
from ldm.checkpoints.folders import is_model
from ldm.checkpoints.key_maps import KeyMap, Layout, unet_map
from ldm.checkpoints.load import check_keys, load_parts, without_weights
from ldm.checkpoints.open import Checkpoint, open_checkpoint
from ldm.checkpoints.published import as_path, where_to_find
from ldm.checkpoints.save import gather, save_checkpoint
from ldm.checkpoints.stored import CheckpointError
from ldm.config import PRESETS, UNetConfig
from ldm.unet import UNet

from .config import ControlConfig
from .control_lora import with_encoder
from .layouts import ControlFile, check_family, control_map, control_values, diffusers_control_map, recognise_control


class ControlCheckpoint:
    """Mixin of `ControlNet`."""

    config: ControlConfig

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        base: StableDiffusion | UNet,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        global_average_pooling: bool | None = None,
    ) -> Self:
        """A trained ControlNet for `base`, on the device of its UNet and in its dtype unless others are given.

        It comes from a file or folder in any published layout, from a training run's folder or one of its states, or
        from `weights/` by its name there (`find_control`). It is locked: in eval mode and without gradients (call
        `requires_grad_` to train it on).

        If the file holds a base, too, only the ControlNet is read, with a warning if that base is not the one given. A
        difference to a base, or a Control-LoRA, is completed with the one given.
        `global_average_pooling` says what no tensor does: see `recognise_control`.
        Raises CheckpointError if there is no such file, no ControlNet in it, or one that does not fit the base.
        """
        unet = base if isinstance(base, UNet) else base.unet
        checkpoint = open_checkpoint(find_control(path_or_name, unet.config))
        found = recognise_control(checkpoint, global_average_pooling)
        check_family(checkpoint, found, unet.config)
        checkpoint, control, key_map = cls.to_fill(checkpoint, found, unet)
        like = next(unet.parameters())
        device, dtype = torch.device(device or like.device), dtype or like.dtype
        is_difference = found.needs_base == "difference"
        load_parts(checkpoint, [(control, key_map)], found.ignored, torch.float32 if is_difference else dtype, device)
        if is_difference:
            control.transfer(None, unet)
            control.to(dtype)
        elif not same_decoder(checkpoint, unet):
            warnings.warn(
                f'"{checkpoint.path}" carries the base that it was trained with, and that is not the one in use: for '
                "the published result load the base from this file, too",
                stacklevel=2,
            )
        return control.eval().requires_grad_(False)

    @classmethod
    def to_fill(cls, checkpoint: Checkpoint, found: ControlFile, unet: UNet) -> tuple[Checkpoint, Self, KeyMap]:
        """-> the file, whose missing weights are computed if it is a Control-LoRA; the ControlNet that it will fill,
        for a base with this UNet; and which weight goes where. Raises CheckpointError for a LoRA that does not fit."""
        config = unet.config.without_inpainting
        with without_weights():
            control = cls.of(UNet(config), found.config)
        key_map = found.key_map(config)
        if found.needs_base == "low rank":
            own = dict(control.encoder.named_parameters(prefix="encoder"))
            theirs = unet.encoder.state_dict(prefix="encoder.")  # also of a packed base
            encoder = {name: part(theirs[name], like) for name, like in own.items()}
            checkpoint = with_encoder(checkpoint, key_map, encoder)
        return checkpoint, control, key_map

    @classmethod
    def check(cls, checkpoint: Checkpoint, found: ControlFile, config: UNetConfig) -> set[str]:
        """-> what loading it for such a base would leave out. Raises CheckpointError for keys and shapes as loading
        does."""
        with without_weights():
            unet = UNet(config)
        checkpoint, control, key_map = cls.to_fill(checkpoint, found, unet)
        return check_keys(checkpoint, [(control, key_map)], found.ignored)

    def save(
        self,
        path: str | Path,
        dtype: torch.dtype | None = None,
        layout: Layout = "ldm",
        difference_to: UNet | None = None,
    ) -> None:
        """Write a file in the original layout, or a new folder in diffusers'. `dtype` None keeps the parameters' own.

        With `difference_to` (original layout only) the file holds the copy minus the encoder of that base, marked as
        other programs mark it: loaded with another base of the family, the ControlNet is transferred to it.
        Raises ValueError for a folder that exists and is not empty, and CheckpointError for an architecture that
        diffusers cannot describe or that has no difference to a base.
        """
        unet = self.encoder.config
        metadata = {"config": json.dumps({"unet": asdict(unet), "control": asdict(self.config)})}
        if layout == "diffusers":
            values = control_values(unet, self.config)
            tensors = gather(self, diffusers_control_map(unet, self.config), dtype)
            with new_folder(path) as folder:
                save_checkpoint(folder / WEIGHTS_NAME, tensors, metadata)
                write_json(folder / "config.json", values)
            return
        control, marks = self, {}
        if difference_to is not None:
            control, marks = copy.deepcopy(self), {"difference": torch.zeros(1)}
            control.transfer(difference_to, None)
        tensors = gather(control, control_map(unet, self.config), dtype)
        save_checkpoint(path, tensors | marks, metadata)

    @torch.no_grad()
    def transfer(self, source: UNet | None, target: UNet | None) -> None:
        """From the base `source`, whose encoder this was copied from, to `target`, another one of its family.

        copy + (encoder of `target` - encoder of `source`), in fp32, is a ControlNet for the other base, as the released
        code's tool_transfer_control.py makes one (the paper's Figure 12 has the copy untouched). Between equal encoders
        nothing changes. A difference has no base: None counts as zero.
        Raises CheckpointError if this is not a copy of such an encoder.
        """
        encoders = []
        for unet, sign in ((target, 1), (source, -1)):
            if unet is not None:
                self.check_copied_from(unet, "it goes to" if sign > 0 else "it comes from")
                encoders.append((unet.encoder.state_dict(), sign))  # also of a packed base, which has no parameters
        for name, own in self.encoder.named_parameters():
            change = sum(sign * part(weights[name], own).to(own.device).float() for weights, sign in encoders)
            own.data = (own.float() + change).to(own.dtype)

    def check_copied_from(self, unet: UNet, which: str) -> None:
        """Raises CheckpointError if no copy of an encoder like that of `unet` is in here."""
        if self.config.architecture == "lite":
            raise CheckpointError(
                "a ControlNet-lite has no copy of its base's encoder to move or subtract: use it as it is"
            )
        if self.encoder.config.without_inpainting != unet.config.without_inpainting:
            raise CheckpointError(
                f"the base that {which} is of another architecture than the ControlNet, which can be moved within its "
                "family only: give a base of that family"
            )


def part(parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a base's parameter that its copy has: an inpainting base's first convolution reads more than the
    latents, which come first."""
    return parameter[tuple(map(slice, like.shape))]


def same_decoder(checkpoint: Checkpoint, unet: UNet) -> bool:
    """Whether the base in a file, if there is one, is `unet`, by its decoder's biases and norms.

    ControlNet 1.0 was trained with the decoder unlocked for some of the files (its repository, issue 46).
    """
    parameters = dict(unet.named_parameters())  # those that are packed are not parameters any more
    sources = unet_map(unet.config).sources(parameters)
    for name, parameter in parameters.items():
        if name.startswith("decoder.") and parameter.ndim == 1 and not parameter.is_meta:
            stored = checkpoint.tensors.get(sources[name].key)
            if stored and not torch.equal(stored.load(parameter.dtype, parameter.device), parameter):
                return False
    return True


# --------------------------------------------------------------------------------------------------- names in weights/

# The small ControlNets by what they are for.
TINY_CONTROLS = {
    "pose": "tiny-pose",
    "circles": "tiny-fill50k",
    "canny": "tiny-canny",
    "scribble": "tiny-scribble",
    "seg": "tiny-seg",
    "depth": "tiny-depth",
}


def find_control(path_or_name: str | Path, unet: UNetConfig) -> Path:
    """The file or folder at this path, or in `weights/` by its name or, for a base with this UNet, its short name. A
    training run's folder stands for what the run has saved.

    Short names are those of `TINY_CONTROLS`, "fill50k" for tiny-fill50k.safetensors, and "canny" for
    control_v11p_sd15_canny.pth. Raises CheckpointError if there is none.
    """
    path, name, weights = of_run(as_path(path_or_name)), str(path_or_name), published.WEIGHTS
    files = [path, *published.places_of(name, weights)]
    for preset in PRESETS.values():
        if preset.unet == unet.without_inpainting:
            files += short_named(name, preset.name)
    for file in files:
        if file.is_file() or (file.is_dir() and is_model(file)):  # no other folder that has the name by chance
            return file
    if path.exists():
        return path
    advice = where_to_find(path)
    for preset in PRESETS:
        for file in short_named(name, preset):
            advice = f"{file.name} is for another base, so say --base {preset}"
    raise CheckpointError(f'there is no ControlNet "{name}", neither as a file nor in {weights}: {advice}')


def of_run(path: Path) -> Path:
    """What a training run has saved, of its folder; any other path as it is."""
    saved = path / "control.safetensors"
    return saved if saved.is_file() and (path / "settings.json").is_file() else path


def short_named(name: str, preset: str) -> list[Path]:
    """The ControlNets in `weights/` for a base that have this short name."""
    weights, found = published.WEIGHTS, []
    if preset == "tiny":
        found = [weights / f"{TINY_CONTROLS.get(name, f'tiny-{name}')}.safetensors"]
    for family in (preset, f"{preset}s2"):  # s2: for clip skip 2
        found += sorted(weights.glob(f"control_*{family}_{glob.escape(Path(name).name)}.*"))
    return [file for file in found if file.is_file()]
