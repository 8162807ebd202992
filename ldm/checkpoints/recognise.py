"""What a base is: in which layout, of which architecture, and what it predicts.

The architecture comes from our own metadata, else from diffusers' configuration files, else from the tensors' shapes.

Whether an SD 2.x base predicts eps (the "base" models, 512x512) or v (768x768) cannot be seen in its weights. The
first of these that says it counts: the caller, our metadata, diffusers' scheduler, the mark `v_pred` or `ztsnr` (a
tensor without numbers, of ComfyUI), the metadata of other trainers and of ComfyUI, the layout of SD-Turbo, the name of
a published file. If none does, v is assumed, with a warning, and eps for those that inpaint. Zero terminal SNR (Lin et
al., arXiv 2305.08891) is never assumed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.config import SD15, SD15_INPAINTING, SD20_INPAINTING, SD21, SD21_BASE, Config

from .diffusers import config_from_diffusers
from .key_maps import SGM_TEXT, KeyMap, Layout, base_maps
from .kinds import FAMILIES, LORA, ONLY, input_channels, kind, pretender
from .open import Checkpoint, open_checkpoint
from .published import find
from .stored import CheckpointError, Damaged, parse_json
from .vae_file import check_vae, open_vae, vae_layout, with_vae

TRANSFORMER_CONTEXT = "transformer_blocks.0.attn2.to_k.weight"
CONTEXT_KEYS = {
    "ldm": f"model.diffusion_model.input_blocks.1.1.{TRANSFORMER_CONTEXT}",
    "diffusers": f"unet.down_blocks.0.attentions.0.{TRANSFORMER_CONTEXT}",
}


@dataclass(frozen=True)
class BaseFile:
    """A base model, open and recognised."""

    checkpoint: Checkpoint
    config: Config
    layout: Layout
    prediction_source: str  # who says `config.schedule.prediction`

    def warn(self) -> None:
        """If the prediction of an SD 2.x model had to be assumed."""
        if self.prediction_source == ASSUMED:
            warnings.warn(
                f'"{self.checkpoint.path}" is an SD 2.x model that may predict v (768x768) or eps (the 512x512 '
                '"base"), assuming v: say --prediction eps (prediction="eps" in Python) if its images are noise',
                stacklevel=3,
            )


def open_base(
    path_or_preset: str | Path, prediction: str | None = None, zero_snr: bool = False, vae: str | Path | None = None
) -> BaseFile:
    """A base by its path or its preset's name, without its weights.

    `prediction` ("eps", "v" or "x0") overrides what the file says, `zero_snr` adds zero terminal SNR, and `vae` is the
    file or folder of another autoencoder.
    Raises CheckpointError if there is no such file, if it is not an SD 1.x or 2.x model, or describes itself in a way
    that makes no sense.
    """
    path, preset = find(path_or_preset)
    checkpoint = open_checkpoint(path)
    if vae is None:
        return identify(checkpoint, prediction, zero_snr, preset)
    other = open_vae(vae)
    base = identify(with_vae(checkpoint, other), prediction, zero_snr, preset)
    check_vae(other, base.config.vae)
    return base


ASSUMED = "assumed, as nothing says it"


def identify(
    checkpoint: Checkpoint, prediction: str | None = None, zero_snr: bool = False, preset: Config | None = None
) -> BaseFile:
    """`open_base` for a checkpoint that is open. `preset` is what its name says, which counts if nothing in it does."""
    if prediction is not None and prediction not in SPELLED:
        raise CheckpointError(f'the prediction is "{prediction}", expected eps, v or x0')
    prediction = SPELLED.get(prediction)
    layout = base_layout(checkpoint)
    described = described_base(checkpoint)
    with description_errors(checkpoint):
        if described is not None:
            config = Config.from_dict(described)
        elif layout == "diffusers" and {"unet", "text_encoder"} <= checkpoint.configs.keys():
            # "eps" is left to the sentence below: there can be no schedule with it and with zero terminal SNR.
            config = config_from_diffusers(checkpoint.configs, None if prediction == "eps" else prediction)
        else:
            config = config_by_shape(checkpoint, layout)
        found, source = prediction_of(checkpoint, config, prediction, preset)
    zero = zero_snr or config.schedule.zero_terminal_snr or ("ztsnr" in checkpoint.tensors and found != "eps")
    if zero and found == "eps":
        option = "--zero-snr, or say --prediction v if it does" if zero_snr else "--prediction eps"
        raise CheckpointError(
            f'"{checkpoint.path}" with prediction eps cannot have zero terminal SNR, which is for models that predict '
            f"v: leave out {option}"
        )
    config = replace(config, schedule=replace(config.schedule, prediction=found, zero_terminal_snr=zero))
    if config == replace(SD21, schedule=SD21_BASE.schedule):  # by its shapes it was taken for the one that predicts v
        config = SD21_BASE
    return BaseFile(checkpoint, config, layout, source)


# -------------------------------------------------------------------------------------------------------- architecture


def base_layout(checkpoint: Checkpoint) -> Layout:
    if pretender(checkpoint):
        raise not_a_base(checkpoint)
    if checkpoint.any_key("model.diffusion_model."):
        return "ldm"
    lone_lora = CONTEXT_KEYS["diffusers"] not in checkpoint.tensors and kind(checkpoint) == LORA
    if not checkpoint.any_key("unet.") or lone_lora:
        raise not_a_base(checkpoint)
    if not checkpoint.any_key("text_encoder."):
        raise CheckpointError(f'"{checkpoint.path}" has no text_encoder/, expected unet/, vae/ and text_encoder/ in it')
    if not checkpoint.any_key("vae.") and not checkpoint.any_key("first_stage_model."):
        raise CheckpointError(
            f'"{checkpoint.path}" has no vae/, expected unet/, vae/ and text_encoder/ in it: give one with --vae FILE'
        )
    return "diffusers"


def maps_in(checkpoint: Checkpoint, config: Config) -> tuple[KeyMap, KeyMap, KeyMap]:
    """Where the UNet, the autoencoder and the text encoder stand in it. The autoencoder may be another one, in
    another layout, and SD-Turbo's text encoder has a prefix of its own."""
    unet, _, text = base_maps(config, "ldm" if checkpoint.any_key("model.diffusion_model.") else "diffusers")
    vae = base_maps(config, vae_layout(checkpoint))[1]
    if checkpoint.any_key(SGM_TEXT):
        text = replace(text, prefix=text.prefix.replace("cond_stage_model.", SGM_TEXT))
    return unet, vae, text


def is_base(checkpoint: Checkpoint) -> bool:
    """Whether it has the keys of one, even if its sizes or its description are not ours."""
    try:
        return base_layout(checkpoint) == "diffusers" or CONTEXT_KEYS["ldm"] in checkpoint.tensors
    except CheckpointError:
        return False


def config_by_shape(checkpoint: Checkpoint, layout: Layout) -> Config:
    key = CONTEXT_KEYS[layout]
    if key not in checkpoint.tensors:
        raise not_a_base(checkpoint)
    width = checkpoint.shape(key)[-1] if len(checkpoint.shape(key)) == 2 else None
    inpainting = input_channels(checkpoint) == SD15_INPAINTING.unet.input_channels
    for config in (SD15_INPAINTING, SD20_INPAINTING) if inpainting else (SD15, SD21):
        if width == config.unet.context_width:
            return config
    raise CheckpointError(
        f'"{checkpoint.path}" has a context of width {width} and no architecture in its metadata: '
        f"expected {' or '.join(f'{w} ({name})' for w, name in FAMILIES.items())}"
    )


def not_a_base(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(f'"{checkpoint.path}" is not a base model of SD 1.x or 2.x: it is {kind(checkpoint)}')


# ---------------------------------------------------------------------------------------------------------- prediction

SPELLED = {"eps": "eps", "epsilon": "eps", "x0": "x0", "sample": "x0"}
SPELLED |= dict.fromkeys(("v", "v_prediction", "v-prediction"), "v")


def prediction_of(
    checkpoint: Checkpoint, config: Config, prediction: str | None, preset: Config | None
) -> tuple[str, str]:
    """What the UNet predicts, and who says so."""
    if prediction is not None:
        return prediction, "the caller"
    if described_base(checkpoint) is not None:
        return config.schedule.prediction, "the metadata"
    if checkpoint.configs.get("scheduler", {}).get("prediction_type") in SPELLED:
        return SPELLED[checkpoint.configs["scheduler"]["prediction_type"]], "the scheduler's configuration"
    for mark in ("v_pred", "ztsnr"):
        if mark in checkpoint.tensors:
            return "v", f"the tensor {mark}, which marks such models"
    for name in ("modelspec.prediction_type", "modelspec.predict_key"):
        if (spelled := checkpoint.metadata.get(name)) in SPELLED:
            return SPELLED[spelled], f"the metadata {name}"
    if checkpoint.any_key(SGM_TEXT):
        return "eps", "its layout, that of SD-Turbo"
    if preset is not None:
        return preset.schedule.prediction, "the file's name, that of a published one"
    if config.unet.context_width == SD21.unet.context_width and not config.unet.inpainting:
        return "v", ASSUMED
    return config.schedule.prediction, "its family"


# -------------------------------------------------------------------------------------------------------- descriptions


def described_config(checkpoint: Checkpoint) -> dict | None:
    """The architecture as we write it into the metadata. None for what others call "config", a common name."""
    try:
        values = parse_json(checkpoint.metadata.get("config", "null"))
    except Damaged:
        return None
    unet = values.get("unet")
    return values if isinstance(unet, dict) and "channels" in unet else None


def described_base(checkpoint: Checkpoint) -> dict | None:
    """That of a base. None if it describes a ControlNet alone, which may share a folder with another program's base."""
    described = described_config(checkpoint)
    if described is None or described.keys() == {"unet", "control"}:
        return None
    return {name: value for name, value in described.items() if name != "control"}


@contextmanager
def description_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever goes wrong while a configuration is read becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f'"{checkpoint.path}" describes its architecture in a way that this version does not know '
            f"({str(error):.200}): {'use the version that wrote it' if described_config(checkpoint) else ONLY}"
        ) from error
