"""What a checkpoint is: a base in which layout and of which architecture, or something else.

The architecture comes from our own metadata, else from diffusers' configuration files, else from the tensors' shapes.
Names of files play no part.

Whether an SD 2.x base predicts eps (the "base" models, 512x512) or v (768x768) cannot be seen in its tensors. The
caller's word comes first, then our metadata, then diffusers' scheduler, then the metadata `modelspec.prediction_type`
that other trainers write; and where nobody says it, v is assumed, with a warning.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ldm.config import SD15, SD21, SD21_BASE, Config

from .diffusers import config_from_diffusers
from .key_maps import Layout
from .load import FAMILIES
from .open import Checkpoint
from .stored import CheckpointError, Damaged, counted, first_few, parse_json

TRANSFORMER_CONTEXT = "transformer_blocks.0.attn2.to_k.weight"
CONTEXT_KEYS = {
    "ldm": f"model.diffusion_model.input_blocks.1.1.{TRANSFORMER_CONTEXT}",
    "diffusers": f"unet.down_blocks.0.attentions.0.{TRANSFORMER_CONTEXT}",
}

# Families that are not supported, by a pattern in any key.
OTHER_FAMILIES = (
    (r"^(embedder|noise_augmentor)\.", "SD unCLIP"),
    (r"^conditioner\.embedders\.(0\.transformer|1)\.|(^|\.)(add_embedding|label_emb\.0)\.", "SDXL"),
    (r"(^|\.)(single_transformer_blocks|double_blocks|controlnet_x_embedder)\.", "Flux"),
    (r"(^|\.)(joint_blocks|pos_embed\.proj)\.", "SD 3"),
)
ANY_CONTROL = r"(^|\.)(input_hint_block|controlnet|controlnet_\w+)\."
ONLY = "only SD 1.x and 2.x are supported"
# What looks like a base or a ControlNet and is none.
PRETENDERS = (
    (r"^(local|global)_adapter\.", "a Uni-ControlNet, which holds several: get a ControlNet for each kind of hint"),
    (r"motion_modules\.", "a motion module of AnimateDiff, which makes videos: give the base that it goes with"),
    (r"(^|\.)(label_emb|class_embedding)\.weight$", "an upscaler, expected a text-to-image model: give SD 1.x or 2.x"),
    (r"^lllite_", "a ControlNet-LLLite, which is another architecture: get a ControlNet"),
    (r"^lora_controlnet$", "a Control-LoRA, which is another architecture: get a ControlNet"),
)
# What a file is that is not what was asked for, by a pattern in any of its keys; the first row that fits.
LORA = "a LoRA, which changes a base: pass it as --lora, beside the base"
CONTROL = "a ControlNet: pass it as --control"
TEXTUAL_INVERSION = "a textual inversion, a word for prompts: pass it as --embedding, beside the base"
WHOLE_FOLDER = "give the folder that holds unet/, vae/ and text_encoder/"
DEEPER = r"input_hint_block\.|control_model\.|model\.diffusion_model\.|controlnet_cond_embedding\."
KINDS = (
    (r"^lora_|[._]lora[._]|\.hada_w|\.lokr_w", LORA),
    (r"^emb_params$|^string_to_(param|token)\.|^<.*>$|^clip_[lg]$", TEXTUAL_INVERSION),
    (r"^(control_model\.)?input_hint_block\.|^controlnet\.|^controlnet_cond_embedding\.", CONTROL),
    (r"^control\.encoder\.", "the state of a training run, for its --resume: give the run's control.safetensors"),
    (r"^(optimizer\.)?state\.\d+\.", "the state of an optimizer: give the weights beside it"),
    (rf"^\w+\.({DEEPER})", "a file whose tensors are a level deeper than a model's: save those alone with torch.save"),
    (r"^(image_proj|ip_adapter)[._]", "an IP-Adapter, which is neither a base nor a ControlNet: leave it out"),
    (
        r"(^|\.)(conv_first|rdb1|RRDB_trunk|model\.1\.sub\.0)\.",
        "an upscaler of finished images (ESRGAN): give the base",
    ),
    (r"^\d+\.\d+\.linear\.", "a hypernetwork, which changes a base: give the base"),
    (r"^adapter\.|^body\.\d", "a T2I-Adapter: get the ControlNet for the same kind of hint"),
    (r"^model\.diffusion_model\.", f"a diffusion model of another architecture, and {ONLY}"),
    (r"^down_blocks\.", f"a UNet in diffusers' layout: {WHOLE_FOLDER}"),
    (r"^(input_blocks|output_blocks)\.", "a UNet alone: give the whole checkpoint"),
    (r"^(first_stage_model\.)?(en|de)coder\.(down|up|mid)", "an autoencoder alone: give the whole checkpoint"),
    (r"^(cond_stage_model|text_model|transformer)\.", "a text encoder alone: give the whole checkpoint"),
    (r"^(unet|vae|text_encoder)\.", f"an incomplete folder in diffusers' layout: {WHOLE_FOLDER}"),
)


@dataclass(frozen=True)
class BaseFile:
    """A base model, recognised."""

    config: Config
    layout: Layout
    prediction_source: str  # who says `config.schedule.prediction`


def recognise(checkpoint: Checkpoint, prediction: str | None = None) -> BaseFile:
    """`prediction` ("eps", "v" or "x0") overrides what the file says.

    Warns where the prediction of an SD 2.x model had to be assumed.
    Raises CheckpointError if the file is no SD 1.x or 2.x model, or describes itself in a way that makes no sense.
    """
    base = identify(checkpoint, prediction)
    if base.prediction_source == ASSUMED:
        warnings.warn(
            f'"{checkpoint.path}" is an SD 2.x model that may predict v (768x768) or eps (the 512x512 "base"), '
            'assuming v: say --prediction eps (prediction="eps" in Python) if its images are noise',
            stacklevel=3,
        )
    return base


ASSUMED = "assumed, as nothing says it"


def identify(checkpoint: Checkpoint, prediction: str | None = None) -> BaseFile:
    """`recognise` without its warning."""
    layout = base_layout(checkpoint)
    described = described_base(checkpoint)
    with description_errors(checkpoint):
        if described is not None:
            config, source = Config.from_dict(described), "the metadata"
        elif layout == "diffusers" and {"unet", "vae", "text_encoder"} <= checkpoint.configs.keys():
            config = config_from_diffusers(checkpoint.configs, prediction)
            known = "prediction_type" in checkpoint.configs.get("scheduler", {})
            source = "the scheduler's configuration" if known else None
        else:
            config, source = config_by_shape(checkpoint, layout), None
        config, source = with_prediction(config, source, checkpoint, prediction)
    return BaseFile(config, layout, source)


def base_layout(checkpoint: Checkpoint) -> Layout:
    if pretender(checkpoint):
        raise not_a_base(checkpoint)
    if checkpoint.any_key("model.diffusion_model."):
        return "ldm"
    if not checkpoint.any_key("unet.") or kind(checkpoint) == LORA:
        raise not_a_base(checkpoint)
    absent = [part for part in ("vae", "text_encoder") if not checkpoint.any_key(f"{part}.")]
    if absent:
        raise CheckpointError(f'"{checkpoint.path}" has no {absent[0]}/, expected unet/, vae/ and text_encoder/ in it')
    return "diffusers"


def is_base(checkpoint: Checkpoint) -> bool:
    """Whether the parts of one are there, of this family or a similar one."""
    try:
        return base_layout(checkpoint) == "diffusers" or CONTEXT_KEYS["ldm"] in checkpoint.tensors
    except CheckpointError:
        return False


def config_by_shape(checkpoint: Checkpoint, layout: Layout) -> Config:
    key = CONTEXT_KEYS[layout]
    if key not in checkpoint.tensors or len(checkpoint.shape(key)) != 2:
        raise not_a_base(checkpoint)
    width = checkpoint.shape(key)[-1]
    for config in (SD15, SD21):
        if width == config.unet.context_width:
            return config
    raise CheckpointError(
        f'"{checkpoint.path}" has a context of width {width} and no architecture in its metadata: '
        f"expected {' or '.join(f'{w} ({name})' for w, name in FAMILIES.items())}"
    )


def with_prediction(
    config: Config, source: str | None, checkpoint: Checkpoint, prediction: str | None
) -> tuple[Config, str]:
    """What the UNet predicts, and who says so: the caller, else `source`, else what is usual."""
    spec = {"epsilon": "eps", "v": "v"}.get(checkpoint.metadata.get("modelspec.prediction_type"))
    if prediction is not None:
        found, source = prediction, "the caller"
    elif source is not None:
        return config, source
    elif spec is not None:
        found, source = spec, "the metadata modelspec.prediction_type"
    elif config.unet.context_width == SD21.unet.context_width:
        found, source = "v", ASSUMED
    else:
        return config, "its family"
    config = replace(config, schedule=replace(config.schedule, prediction=found))
    if config == replace(SD21, schedule=SD21_BASE.schedule):
        return SD21_BASE, source
    return config, source


def not_a_base(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(f'"{checkpoint.path}" is not a base model of SD 1.x or 2.x: it is {kind(checkpoint)}')


def kind(checkpoint: Checkpoint) -> str:
    """What a file seems to be that is not what was expected."""
    found = pretender(checkpoint) or matching(checkpoint, KINDS)
    if found:
        return found
    if not checkpoint.keys:
        return "a file without tensors: get the model again"
    keys = f"{counted(len(checkpoint.keys), 'key')}: {first_few(sorted(checkpoint.keys))}"
    if len(checkpoint.keys) <= 2 and all(
        tensor.shape[-1:] in ((768,), (1024,)) for tensor in checkpoint.tensors.values()
    ):
        return f"a textual inversion ({keys}), a word for prompts: pass it as --embedding, beside the base"
    return f"something unknown ({keys}), expected keys of the original layout or diffusers'"


def pretender(checkpoint: Checkpoint) -> str | None:
    """What a file is that looks like a base or a ControlNet, but for another family or use; None for all others."""
    family = matching(checkpoint, OTHER_FAMILIES)
    if family is None:
        return matching(checkpoint, PRETENDERS)
    if matching(checkpoint, ((ANY_CONTROL, "control"),)):
        return f"a ControlNet for {family}, and {ONLY}: get the one for your base"
    return f"{'a' if family == 'Flux' else 'an'} {family} checkpoint, and {ONLY}"


def matching(checkpoint: Checkpoint, rows: tuple[tuple[str, str], ...]) -> str | None:
    lines = "\n".join(checkpoint.tensors)  # one search a pattern, not one a key
    return next((what for pattern, what in rows if re.search(pattern, lines, re.MULTILINE)), None)


# --------------------------------------------------------------------------------------------------- descriptions


def described_config(checkpoint: Checkpoint) -> dict | None:
    """The architecture as we write it into the metadata, None in files of others: "config" is a common name."""
    try:
        values = parse_json(checkpoint.metadata.get("config", "null"))
    except Damaged:
        return None
    unet = values.get("unet")
    return values if isinstance(unet, dict) and "channels" in unet else None


def described_base(checkpoint: Checkpoint) -> dict | None:
    """That of a base. None for a lone ControlNet, which may stand in a folder beside another program's base."""
    described = described_config(checkpoint)
    if described is None or described.keys() == {"unet", "control"}:
        return None
    return {name: value for name, value in described.items() if name != "control"}


@contextmanager
def description_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """What goes wrong when a configuration is read inside -> a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f'"{checkpoint.path}" describes its architecture in a way that this version does not know '
            f"({str(error):.200}): {'use the version that wrote it' if described_config(checkpoint) else ONLY}"
        ) from error
