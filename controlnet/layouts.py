"""Where each parameter of a ControlNet stands in a checkpoint, and what kind of ControlNet a checkpoint holds.

The layouts are those of the base (ldm/checkpoints/key_maps.py): "ldm" as ControlNet 1.0 and 1.1 were released,
"diffusers" as that library saves one. A ControlNet's encoder has the keys of the UNet's under another prefix. And there
is "state", our own names, as the state of a training run has them.
"""

from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

from ldm.checkpoints.diffusers import encoder_values
from ldm.checkpoints.key_maps import KeyMap, Layout, Rows, diffusers_encoder_rows, encoder_length, encoder_rows
from ldm.checkpoints.kinds import FAMILIES, input_channels, kind, other_use, pretender
from ldm.checkpoints.load import BASE_PARTS
from ldm.checkpoints.open import Checkpoint, open_checkpoint
from ldm.checkpoints.recognise import described_config, description_errors, identify
from ldm.checkpoints.stored import CheckpointError
from ldm.config import PRESETS, SD15, UNetConfig, dataclass_from_dict

from .config import HINT_STRIDES, ControlConfig
from .control_lora import MARK

# How the other keys begin that a file may have beside a ControlNet's, and those that the state of a run may have.
IGNORED_BESIDE_CONTROL = (*BASE_PARTS, "model_ema.")
IGNORED_IN_STATE = ("control.", "average.", "decoder.", "optimisation.")

# ------------------------------------------------------------------------------------------------------------ keys


def control_map(unet: UNetConfig, control: ControlConfig, prefix: str = "control_model.") -> KeyMap:
    """For a copy of the encoder of `unet`. Some files of other programs have the prefix "" here."""
    # Their hint encoder counts its activations, too, so every other module is a convolution.
    convs = [(f"hint_encoder.convs.{i}", f"input_hint_block.{2 * i}") for i in range(len(control.hint_widths) + 1)]
    zero_convs = [(f"zero_convs.{i}", f"zero_convs.{i}.0") for i in range(encoder_length(unet))]
    encoder = lite_rows(unet) if control.architecture == "lite" else encoder_rows(unet)
    outputs = [*zero_convs, ("middle_zero_conv", "middle_block_out.0")]
    return KeyMap(prefix, [*convs, *encoder, *([] if control.architecture == "concat" else outputs)])


def lite_rows(unet: UNetConfig) -> Rows:
    """Of an encoder of single convolutions, which only our files have."""
    blocks = [(f"encoder.blocks.{i}", f"input_blocks.{i}.0") for i in range(encoder_length(unet))]
    return [*blocks, ("encoder.middle", "middle_block.0")]


def diffusers_control_map(unet: UNetConfig, control: ControlConfig, prefix: str = "") -> KeyMap:
    last = len(control.hint_widths)
    names = ["conv_in", *(f"blocks.{i}" for i in range(last - 1)), "conv_out"]
    convs = [(f"hint_encoder.convs.{i}", f"controlnet_cond_embedding.{name}") for i, name in enumerate(names)]
    zero_convs = [(f"zero_convs.{i}", f"controlnet_down_blocks.{i}") for i in range(encoder_length(unet))]
    middle = ("middle_zero_conv", "controlnet_mid_block")
    return KeyMap(prefix, [*convs, *diffusers_encoder_rows(unet), *zero_convs, middle])


# ------------------------------------------------------------------------------------------ diffusers' config.json


def control_from_diffusers(values: dict) -> ControlConfig:
    """Their hint encoder's channels come once for each resolution, ours once for each convolution."""
    channels = values.get("conditioning_embedding_out_channels", [16, 32, 96, 256])
    if values.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise ValueError("controlnet_conditioning_channel_order is not rgb")
    return ControlConfig(
        values.get("conditioning_channels", 3),
        (channels[0], *chain.from_iterable(pairwise(channels))),  # A B C D -> A, A B, B C, C D
        values.get("global_pool_conditions", False),
    )


def control_values(unet: UNetConfig, control: ControlConfig) -> dict:
    """The inverse. Raises CheckpointError for a ControlNet that diffusers cannot describe."""
    values = {
        "_class_name": "ControlNetModel",
        **encoder_values(unet),
        "conditioning_channels": control.hint_channels,
        "conditioning_embedding_out_channels": [*control.hint_widths[::2]],
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": control.global_average_pooling,
    }
    if control_from_diffusers(values) != control:
        raise CheckpointError(
            f"diffusers cannot describe a ControlNet of the architecture {control.architecture} whose hint encoder has "
            f"{', '.join(map(str, control.hint_widths))} channels, expected a full copy and channels in pairs (A A B "
            "B C C D): save it in the original layout, as a file whose name ends in .safetensors"
        )
    return values


# ----------------------------------------------------------------------------------------------------- recognition


@dataclass(frozen=True)
class ControlFile:
    """What a checkpoint with a ControlNet in it says about it."""

    config: ControlConfig
    layout: Layout | Literal["state"]
    prefix: str  # of its keys
    # Its copy of the encoder is stored minus the base's encoder, or as changes of low rank to it (control_lora.py).
    needs_base: Literal["difference", "low rank"] | None = None

    @property
    def ignored(self) -> tuple[str, ...]:
        return IGNORED_IN_STATE if self.layout == "state" else IGNORED_BESIDE_CONTROL

    def key_map(self, unet: UNetConfig) -> KeyMap:
        """`unet` is that of the base."""
        make = diffusers_control_map if self.layout == "diffusers" else control_map
        key_map = make(unet, self.config, self.prefix)
        if self.layout == "state":
            key_map = replace(key_map, modules=[(ours, ours) for ours, _ in key_map.modules])
        # Where the copy is equal to the base, some programs leave the difference out.
        return replace(key_map, sparse=("encoder.",)) if self.needs_base == "difference" else key_map


# (layout, prefix of all keys, what the hint encoder's have next); some programs drop "control_model."
CONTROL_FORMS = (
    ("ldm", "control_model.", "input_hint_block."),
    ("ldm", "", "input_hint_block."),
    ("diffusers", "", "controlnet_cond_embedding."),
    ("diffusers", "controlnet.", "controlnet_cond_embedding."),
    ("state", "average.", "hint_encoder.convs."),  # where there is a moving average, it is what a run saves
    ("state", "control.", "hint_encoder.convs."),
    ("state", "", "hint_encoder.convs."),  # its state_dict alone, as torch.save writes it
)


def recognise_control(checkpoint: Checkpoint, global_average_pooling: bool | None = None) -> ControlFile:
    """The ControlNet in this file, whatever else is there.

    `global_average_pooling` overrides what our metadata, diffusers' configuration or the run of a state say. Where
    nothing says it, there is none.
    Raises CheckpointError if there is no ControlNet in it, or if it describes itself in a way that makes no sense.
    """
    if pretender(checkpoint):
        raise CheckpointError(f'"{checkpoint.path}" holds no ControlNet for SD 1.x or 2.x: it is {kind(checkpoint)}')
    forms = [form for form in CONTROL_FORMS if checkpoint.any_key(form[1] + form[2])]
    if not forms:
        raise CheckpointError(f'"{checkpoint.path}" holds no ControlNet: it is {what_else(checkpoint)}')
    layout, prefix, _ = forms[0]
    described = described_config(checkpoint) or {}
    with description_errors(checkpoint):
        if "control" in described:
            config = dataclass_from_dict(ControlConfig, described["control"])
        elif layout == "diffusers" and prefix.rstrip(".") in checkpoint.configs:
            config = control_from_diffusers(checkpoint.configs[prefix.rstrip(".")])
        else:
            config = control_by_shape(checkpoint, layout, prefix)
            if layout == "state":
                config = replace(config, global_average_pooling=run_is_pooled(checkpoint.path))
        if global_average_pooling is not None:
            config = replace(config, global_average_pooling=global_average_pooling)
    needs_base = "difference" if "difference" in checkpoint.tensors else None
    return ControlFile(config, layout, prefix, "low rank" if MARK in checkpoint.tensors else needs_base)


def run_is_pooled(state: Path) -> bool:
    """Whether the ControlNet that this state's run has saved is pooled; False if the state was moved out of its run."""
    run = state.resolve().parent.parent
    saved = run / "control.safetensors"
    if not saved.is_file() or not (run / "settings.json").is_file():
        return False
    return recognise_control(open_checkpoint(saved)).config.global_average_pooling


def what_else(checkpoint: Checkpoint) -> str:
    try:
        base = identify(checkpoint)
    except CheckpointError:
        return kind(checkpoint)
    if base.config.unet.inpainting:
        return "a base model for inpainting, without one: pass it as --base, with --init and --mask"
    return other_use(input_channels(checkpoint) or 4) or "a base model without one: pass it as --base"


def check_family(checkpoint: Checkpoint, found: ControlFile, unet: UNetConfig) -> None:
    """Raises CheckpointError for a ControlNet of another family than a base with this UNet."""
    widths = context_widths(checkpoint, found.prefix)
    if not widths or widths[0] == unet.context_width:
        return
    width = widths[0]
    bases = {preset.unet.context_width: name for name, preset in reversed(PRESETS.items())}  # the first of each width
    names = bases | FAMILIES
    family, own = (names.get(w, f"a base with a context of width {w}") for w in (width, unet.context_width))
    advice = f"give --base {bases[width]}, or another of its family" if width in bases else "give its own as --base"
    raise CheckpointError(f'"{checkpoint.path}" is a ControlNet for {family}, and your base is {own}: {advice}')


def context_widths(checkpoint: Checkpoint, prefix: str = "") -> list[int]:
    """The last side of each matrix that is multiplied with the prompt's context."""
    # The second is a Control-LoRA's, the third that of a run's state.
    ends = ("attn2.to_k.weight", "attn2.to_k.down", "cross_attention.k.weight")
    keys = (key for key in checkpoint.tensors if key.startswith(prefix) and key.endswith(ends))
    return [shape[-1] for shape in map(checkpoint.shape, keys) if shape]


def control_by_shape(checkpoint: Checkpoint, layout: str, prefix: str) -> ControlConfig:
    """From the shapes of the hint encoder, or the published sizes if it is not whole. The paper's baselines are looked
    for only in the state of a run, as our other files describe them."""
    sources = ControlFile(ControlConfig(), layout, prefix).key_map(SD15.unet).sources
    convs = (f"hint_encoder.convs.{i}.weight" for i in range(len(HINT_STRIDES)))
    keys = [source.key for source in sources(convs).values()]
    if not all(key in checkpoint.tensors and len(checkpoint.shape(key)) == 4 for key in keys):
        return ControlConfig()
    widths = tuple(checkpoint.shape(key)[0] for key in keys)
    architecture = "full"
    if layout == "state" and f"{prefix}middle_zero_conv.weight" not in checkpoint.tensors:
        architecture = "concat"
    elif layout == "state" and f"{prefix}encoder.blocks.1.weight" in checkpoint.tensors:
        architecture = "lite"
    return ControlConfig(checkpoint.shape(keys[0])[1], widths, architecture=architecture)
