"""What a checkpoint is: base, ControlNet or something else, in which layout, and with which architecture.

The architecture comes from our own metadata, else from diffusers' configuration files, else from the tensors' shapes.
Names of files play no part.

Whether an SD 2.x base predicts eps (the "base" models, 512x512) or v (768x768) is not to be seen in its tensors. The
caller's word comes first, then our metadata, then diffusers' scheduler, then the metadata `modelspec.prediction_type`
that other trainers write; and where nobody says it, v is assumed, with a warning.
"""

import math
import re
import typing
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from ldm.config import SD15, SD21, SD21_BASE, Config, ControlConfig, dataclass_from_dict
from ldm.schedule import Schedule

from .checkpoint import FAMILIES, IGNORED, PARTS, Checkpoint, CheckpointError, counted, first_few
from .diffusers_layout import config_from_diffusers, control_from_diffusers
from .key_maps import KeyMap, Layout, control_map, diffusers_control_map
from .mapped import Damaged, parse_json

TRANSFORMER_CONTEXT = "transformer_blocks.0.attn2.to_k.weight"
CONTEXT_KEYS = {
    "ldm": f"model.diffusion_model.input_blocks.1.1.{TRANSFORMER_CONTEXT}",
    "diffusers": f"unet.down_blocks.0.attentions.0.{TRANSFORMER_CONTEXT}",
}

# What a file is that is not what was asked for, by a pattern in any of its keys; the first row that fits.
LORA = "a LoRA: give the whole checkpoint that it was merged into"
CONTROL = "a ControlNet: pass it as --control"
TEXTUAL_INVERSION = "a textual inversion, which is no model: give the base"
WHOLE_FOLDER = "give the folder that holds unet/, vae/ and text_encoder/"
OTHER_FAMILY = "and only SD 1.x and 2.x are supported"
KINDS = (
    (
        r"^lora_|[._]lora[._]|\.hada_w|\.lokr_w",
        LORA,
    ),
    (r"^conditioner\.embedders\.|(^|\.)add_embedding\.", f"an SDXL checkpoint, {OTHER_FAMILY}"),
    (r"(^|\.)label_emb\.", f"a model of the SDXL family, {OTHER_FAMILY}"),
    (r"(^|\.)joint_blocks\.", f"an SD 3 checkpoint, {OTHER_FAMILY}"),
    (r"(^|\.)double_blocks\.", f"a Flux checkpoint, {OTHER_FAMILY}"),
    (r"^emb_params$|^string_to_(param|token)\.|^<.*>$|^clip_[lg]$", TEXTUAL_INVERSION),
    (r"^(control_model\.)?input_hint_block\.|^controlnet\.|^controlnet_cond_embedding\.", CONTROL),
    (r"^adapter\.|^body\.\d|^image_proj", "an adapter, which is neither a base nor a ControlNet"),
    (r"^model\.diffusion_model\.", f"a diffusion model of another architecture, {OTHER_FAMILY}"),
    (r"^down_blocks\.", f"a UNet in diffusers' layout: {WHOLE_FOLDER}"),
    (r"^(input_blocks|output_blocks)\.", "a UNet alone: give the whole checkpoint"),
    (r"^(first_stage_model\.)?(en|de)coder\.(down|up|mid)", "an autoencoder alone: give the whole checkpoint"),
    (r"^(cond_stage_model|text_model|transformer)\.", "a text encoder alone: give the whole checkpoint"),
    (r"^(unet|vae|text_encoder)\.", f"an incomplete folder in diffusers' layout: {WHOLE_FOLDER}"),
)
BASE = "a base model without one: pass it as --base"


# ----------------------------------------------------------------------------------------------------------- bases


@dataclass(frozen=True)
class Base:
    """A base model, recognised."""

    config: Config
    layout: Layout
    prediction_source: str  # who says `config.schedule.prediction`


def recognise(checkpoint: Checkpoint, prediction: str | None = None) -> Base:
    """`prediction` ("eps", "v" or "x0") overrides what the file says.

    Warns where the prediction of an SD 2.x model had to be assumed.
    Raises CheckpointError if the file is no SD 1.x or 2.x model, or describes itself in a way that makes no sense.
    """
    base = identify(checkpoint, prediction)
    if base.prediction_source == ASSUMED:
        warnings.warn(
            f'"{checkpoint.path}" is an SD 2.x model that may predict v (768x768) or eps (the 512x512 "base"), '
            'assuming v: say --prediction eps (prediction="eps" in Python) if its pictures are noise',
            stacklevel=3,
        )
    return base


ASSUMED = "assumed, as nothing says it"


def identify(checkpoint: Checkpoint, prediction: str | None = None) -> Base:
    """`recognise` without its warning."""
    layout = base_layout(checkpoint)
    described = described_config(checkpoint)
    with description_errors(checkpoint):
        if described is not None and described.keys() != CONTROL_DESCRIPTION:
            # Beside a ControlNet in the same file, that is described too.
            own = {name: value for name, value in described.items() if name != "control"}
            config, source = Config.from_dict(own), "the metadata"
        elif layout == "diffusers" and {"unet", "vae", "text_encoder"} <= checkpoint.configs.keys():
            config = config_from_diffusers(checkpoint.configs, prediction)
            known = "prediction_type" in checkpoint.configs.get("scheduler", {})
            source = "the scheduler's configuration" if known else None
        else:
            config, source = config_by_shape(checkpoint, layout), None
        config, source = with_prediction(config, source, checkpoint, prediction)
        check_config(config)
    return Base(config, layout, source)


def base_layout(checkpoint: Checkpoint) -> Layout:
    if checkpoint.any_key("model.diffusion_model."):
        return "ldm"
    if not checkpoint.any_key("unet.") or kind(checkpoint) == LORA:
        raise not_a_base(checkpoint)
    absent = [part for part in ("vae", "text_encoder") if not checkpoint.any_key(f"{part}.")]
    if absent:
        raise CheckpointError(f'"{checkpoint.path}" has no {absent[0]}/, expected unet/, vae/ and text_encoder/ in it')
    return "diffusers"


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
    lines = "\n".join(checkpoint.tensors)  # one search a pattern, not one a key
    for pattern, what in KINDS:
        if re.search(pattern, lines, re.MULTILINE):
            return what
    keys = f"{counted(len(checkpoint.keys), 'key')}: {first_few(sorted(checkpoint.keys))}"
    if len(checkpoint.keys) <= 2 and all(
        tensor.shape[-1:] in ((768,), (1024,)) for tensor in checkpoint.tensors.values()
    ):
        return f"a textual inversion ({keys}), which is no model: give the base"
    return f"something unknown ({keys}), expected keys of the original layout or diffusers'"


# -------------------------------------------------------------------------------------------------------- controls


@dataclass(frozen=True)
class Control:
    """A ControlNet, recognised."""

    config: ControlConfig
    layout: Layout
    prefix: str  # of its keys
    difference: bool  # its copy of the encoder is stored minus the base's encoder

    def key_map(self, unet) -> KeyMap:
        """`unet` is the UNetConfig of the base."""
        make = control_map if self.layout == "ldm" else diffusers_control_map
        return make(unet, self.config, self.prefix)


# (layout, what the keys begin with); some programs drop the original layout's "control_model."
CONTROL_FORMS: tuple[tuple[Layout, str, str], ...] = (
    ("ldm", "control_model.", "input_hint_block."),
    ("ldm", "", "input_hint_block."),
    ("diffusers", "", "controlnet_cond_embedding."),
    ("diffusers", "controlnet.", "controlnet_cond_embedding."),
)


def recognise_control(checkpoint: Checkpoint, global_average_pooling: bool | None = None) -> Control:
    """The ControlNet in this file, whatever else is there.

    `global_average_pooling` overrides what our metadata or diffusers' configuration say; without a word there is none.
    Raises CheckpointError if there is no ControlNet in it, or if it describes itself in a way that makes no sense.
    """
    forms = [form for form in CONTROL_FORMS if checkpoint.any_key(form[1] + form[2])]
    if not forms:
        base = attempt(identify, checkpoint)
        raise CheckpointError(f'"{checkpoint.path}" holds no ControlNet: it is {BASE if base else kind(checkpoint)}')
    layout, prefix, hint_encoder = forms[0]
    described = described_config(checkpoint) or {}
    with description_errors(checkpoint):
        if "control" in described:
            config = dataclass_from_dict(ControlConfig, described["control"])
        elif layout == "diffusers" and prefix.rstrip(".") in checkpoint.configs:
            config = control_from_diffusers(checkpoint.configs[prefix.rstrip(".")])
        else:
            config = control_by_shape(checkpoint, layout, prefix + hint_encoder)
        if global_average_pooling is not None:
            config = replace(config, global_average_pooling=global_average_pooling)
        check_control_config(config)
    return Control(config, layout, prefix, "difference" in checkpoint.tensors)


def control_by_shape(checkpoint: Checkpoint, layout: Layout, start: str) -> ControlConfig:
    """The channels along the hint encoder; the published ones where it is not whole."""
    numbers = [2 * i for i in range(7)]
    names = numbers if layout == "ldm" else ["conv_in", *(f"blocks.{i}" for i in range(6))]
    keys = [f"{start}{name}.weight" for name in names]
    if not all(key in checkpoint.tensors and len(checkpoint.shape(key)) == 4 for key in keys):
        return ControlConfig()
    return ControlConfig(checkpoint.shape(keys[0])[1], tuple(checkpoint.shape(key)[0] for key in keys))


# --------------------------------------------------------------------------------------------------- descriptions


CONTROL_DESCRIPTION = {"unet", "control"}  # of a ControlNet alone, which may stand in a folder beside a base of others


def described_config(checkpoint: Checkpoint) -> dict | None:
    """The architecture as we write it into the metadata, None in files of others: "config" is a common name."""
    try:
        values = parse_json(checkpoint.metadata.get("config", "null"))
    except Damaged:
        return None
    unet = values.get("unet")
    return values if isinstance(unet, dict) and "channels" in unet else None


@contextmanager
def description_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f'"{checkpoint.path}" describes its architecture in a way that this version does not know '
            f"({str(error):.200}): use the version that wrote it"
        ) from error


LARGEST = 2**16  # no number of an architecture is larger
LARGEST_OF = {"blocks": 16, "layers": 128, "multipliers": 64, "vocabulary": 49408}


def check_config(config: Config) -> None:
    """Raises ValueError or TypeError for numbers that no model can be built from, before one is."""
    unet, vae, text = config.unet, config.vae, config.text
    for part in (unet, vae, text, config.schedule):
        check_values(part)
    if not len(unet.multipliers) == len(unet.attention) == len(unet.heads):
        raise ValueError("multipliers, attention and heads have not one entry a level each")
    check_divisible(unet.widths, unet.groups, "groups")
    for width, heads in zip(unet.widths, unet.heads, strict=True):
        check_divisible([width], heads, "heads")
    check_divisible(vae.widths, vae.groups, "groups")
    check_divisible([text.width], text.heads, "heads")
    if text.vocabulary < 514 or text.positions < 2:
        raise ValueError(f"a vocabulary of {text.vocabulary} and {text.positions} positions hold no prompt")
    if not isinstance(config.name, str) or type(config.resolution) is not int:
        raise TypeError("its name is no text or its resolution no number")
    Schedule(config.schedule)


def check_control_config(config: ControlConfig) -> None:
    check_values(config)
    if len(config.hint_widths) != len(ControlConfig().hint_widths):
        raise ValueError(
            f"hint_widths has {len(config.hint_widths)} entries, expected {len(ControlConfig().hint_widths)}"
        )


def check_values(part: Any) -> None:
    """Each field against its default's type and a plausible range."""
    for field in fields(part):
        value = getattr(part, field.name)
        choices = typing.get_args(field.type)
        if isinstance(field.default, str):
            fits = value in choices
        elif isinstance(field.default, tuple):
            kind = type(field.default[0])
            fits = isinstance(value, tuple) and 1 <= len(value) <= 8 and all(fits_in(v, kind, field) for v in value)
        else:
            fits = fits_in(value, type(field.default), field)
        if not fits:
            raise ValueError(f"{field.name} is {value!r:.80}")


def fits_in(value: Any, kind: type, field: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value) and 0 < value <= LARGEST
    return type(value) is kind and (kind is bool or 1 <= value <= LARGEST_OF.get(field.name, LARGEST))


def check_divisible(widths: Any, parts: int, what: str) -> None:
    for width in widths:
        if width % parts:
            raise ValueError(f"{width} channels cannot be shared by {parts} {what}")


# -------------------------------------------------------------------------------------------------------- contents


@dataclass(frozen=True)
class Contents:
    """What a file holds, from its headers alone: for programs that show it."""

    kind: str  # "base", "ControlNet", "base with a ControlNet", or a word for what it is
    layout: Layout | None
    family: str | None  # "SD 1.x" or "SD 2.x"
    base: Base | None
    control: Control | None
    parameters: dict[str, int]  # floating-point numbers by part
    dtypes: dict[str, int]  # floating-point numbers by type
    ema: bool


def contents(checkpoint: Checkpoint, prediction: str | None = None) -> Contents:
    """Never raises for a file that could be opened: what is no model is described as `kind`."""
    base = attempt(identify, checkpoint, prediction)
    control = attempt(recognise_control, checkpoint)
    names = [name for name, found in (("base", base), ("ControlNet", control)) if found]
    parameters, dtypes = Counter(), Counter()
    for key, tensor in checkpoint.tensors.items():
        if tensor.dtype.is_floating_point and key not in IGNORED:
            start = next((start for start in PARTS if key.startswith(start)), None)
            parameters[PARTS.get(start, "ControlNet" if control and not base else "other")] += tensor.numel
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    widths = [tensor.shape[-1] for key, tensor in checkpoint.tensors.items() if key.endswith("attn2.to_k.weight")]
    return Contents(
        " with a ".join(names) or kind(checkpoint),
        (base or control).layout if names else None,
        FAMILIES.get(widths[0]) if widths else None,
        base,
        control,
        dict(parameters),
        dict(dtypes),
        checkpoint.any_key("model_ema."),
    )


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except CheckpointError:
        return None
