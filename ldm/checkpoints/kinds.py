"""What a file is if it is not what was asked for: tables of patterns in its keys, and what to do instead.

A row fits if each of its patterns fits some key, and the first row that fits counts; the file's name plays no part.
Each key is searched with a dot before it, so that a dot and a name find a module at any depth.
"""

import re

from ldm.config import SD15, SD21

from .open import Checkpoint
from .stored import counted, first_few

Rows = tuple[tuple[str | tuple[str, ...], str], ...]

ONLY = "only SD 1.x and 2.x are supported"
ANY_CONTROL = r"\.(input_hint_block|controlnet|controlnet_\w+)\."
TEXT_TO_IMAGE = "expected a text-to-image model: give SD 1.x or 2.x"
ANOTHER = "which is another architecture: get a ControlNet"
MOTION = r"\.motion_modules\."

# What looks like a base or a ControlNet that can be loaded, and is not.
PRETENDERS: Rows = (
    (r"^\.(local|global)_adapter\.", "a Uni-ControlNet, which holds several: get a ControlNet for each kind of hint"),
    ((MOTION, ANY_CONTROL), f"a SparseCtrl, for AnimateDiff's videos, {ANOTHER}"),
    (MOTION, "a motion module of AnimateDiff, which makes videos: give the base that it goes with"),
    (r"\.(enc_zero_convs\w*|dec_zero_convs\w*|ctrl_to_base|base_to_ctrl)\.", f"a ControlNet-XS, {ANOTHER}"),
    (
        r"^\.(task_embedding$|spatial_ch_projs\.|control_add_embedding\.|control_type_proj)",
        f"a ControlNet Union for SDXL, and {ONLY}: get the ControlNet for your base and kind of hint",
    ),
    (r"^\.lllite_", f"a ControlNet-LLLite, {ANOTHER}"),
    (r"\.(brushnet_\w+|conv_in_condition)\.", f"a BrushNet, {ANOTHER}"),
    (r"^\.scaled_fp8$|\.scale_weight$", "a model in scaled fp8, which is not read here: get it in fp16 or fp32"),
    (r"\.cond_proj\.", "a latent consistency model (LCM), sampled in another way: give the base it was made from"),
    (r"\.position_net\.|\.fuser\.", "a GLIGEN model, which places objects in boxes: give the base without it"),
    (
        r"\.(label_emb|class_embedding)\.weight$|^\.unet\.down_blocks\.0\.resnets\.0\.norm1\.linear\.",
        f"an upscaler, {TEXT_TO_IMAGE}",
    ),
    (r"^\.depth_model\.", f"a depth model (depth2img), {TEXT_TO_IMAGE}, with a depth control"),
    (
        r"^\.(cond_stage_model\.(model\.)?visual|cc_projection|image_encoder\.vision_model)\.",
        f"a model that varies images (its prompt is one), {TEXT_TO_IMAGE}",
    ),
)

# Families that are not supported.
OTHER_FAMILIES: Rows = (
    (r"^\.(embedder|noise_augmentor)\.|\.class_embedding\.linear_1\.", "SD unCLIP"),
    (r"\.(time_stack|time_mixer|temporal_transformer_blocks)\.", "Stable Video Diffusion"),
    (r"\.(temp_convs|temp_attentions|temopral_conv|temporal_conv)\.", "text-to-video"),
    ((r"^\.conditioner\.embedders\.0\.model\.", r"\.label_emb\.0\."), "SDXL refiner"),
    (r"^\.conditioner\.embedders\.1\.|\.(add_embedding|label_emb\.0)\.", "SDXL"),
    (r"\.(single_transformer_blocks|double_blocks|controlnet_x_embedder)\.", "Flux"),
    (r"\.adaln_single\.", "PixArt"),
    (r"\.(clip_txt_mapper|channelwise)\.", "Stable Cascade"),
    (r"\.(cap_embedder|double_layers|patch_embedding|style_embedder)\.", "diffusion transformer's"),
    (r"\.(joint_blocks|pos_embed\.proj|pos_embed_input\.proj)\.", "SD 3"),
)
PIPELINES = (("StableDiffusionXL", "SDXL"), ("StableDiffusion3", "SD 3"), ("Flux", "Flux"), ("PixArt", "PixArt"))

IP_ADAPTER = "an IP-Adapter, which is neither a base nor a ControlNet: leave it out"
LORA = "a LoRA, which changes a base: pass it as --lora"
BASE = "a base model: pass it as --base"
CONTROL = "a ControlNet: pass it as --control"
TEXTUAL_INVERSION = "a textual inversion, which is not a model: pass it as --embedding"
VAE = "an autoencoder alone: pass it as --vae, and a whole checkpoint as --base"
WHOLE_FOLDER = "give the folder that holds unet/, vae/ and text_encoder/"
DEEPER = r"input_hint_block\.|control_model\.|model\.diffusion_model\.|controlnet_cond_embedding\."
CONTEXT = r"transformer_blocks\.0\.attn2\.to_k\.weight"
KINDS: Rows = (
    (r"^\.(image_proj|ip_adapter)[._]", IP_ADAPTER),
    (r"^\.lora_(?!controlnet$)|.[._]lora[._]|\.hada_w|\.lokr_w|\.oft_|\.dora_scale", LORA),
    (r"^\.emb_params$|^\.string_to_(param|token)\.|^\.<.*>$|^\.clip_[lg]$", TEXTUAL_INVERSION),
    (r"^\.(control_model\.)?input_hint_block\.|^\.controlnet\.|^\.(controlnet_cond_embedding|hint_encoder)\.", CONTROL),
    (r"^\.control\.encoder\.", "the state of a training run, which has a ControlNet: pass it as --control"),
    (r"^\.(optimizer\.)?state\.\d+\.", "the state of an optimizer: give the weights beside it"),
    (rf"^\.[\w.-]+\.({DEEPER})", "a file with the tensors of several models: save those of one with torch.save"),
    (r"\.(stylegan_decoder|quantize)\.", "a model that mends faces in finished images: give the base"),
    (
        r"\.(conv_first|rdb1|RRDB_trunk|model\.1\.sub\.0|conv_before_upsample|conv_up1)\.|^\.(params\.)?body\.\d+\.weight$",
        "an upscaler of finished images (ESRGAN): give the base",
    ),
    (r"^\.\d+\.\d+\.linear\.", "a hypernetwork, which changes a base: give the base"),
    (
        r"^\.adapter\.|^\.body\.\d+\.(block\d|in_conv|resnets|down_opt)|^\.style_embedding$",
        "a T2I-Adapter: get the ControlNet for the same kind of hint",
    ),
    (
        r"^\.(pretrained|scratch)\.|^\.net(Vgg|Combine)|^\.model0\.conv1_1\.",
        "a detector, which makes hints: see `python -m tools.make_hints --help`",
    ),
    (
        rf"^\.model\.diffusion_model\.input_blocks\.1\.1\.{CONTEXT}$|^\.unet\.down_blocks\.0\.attentions\.0\.{CONTEXT}$",
        BASE,
    ),
    (r"^\.model\.diffusion_model\.", f"a diffusion model of another architecture, and {ONLY}"),
    (r"^\.down_blocks\.", f"a UNet in diffusers' layout: {WHOLE_FOLDER}"),
    (r"^\.(input_blocks|output_blocks)\.", "a UNet alone: give the whole checkpoint"),
    (
        r"^\.((encoder|decoder)\.layers\.)?\d+\.(conv\.\d+\.)?weight$",
        "a small autoencoder (TAESD), which is another architecture",
    ),
    (r"^\.(first_stage_model\.|vae\.)?(en|de)coder\.(down|up|mid)", VAE),
    (
        r"^\.(conditioner|cond_stage_model|text_model|transformer)\.|\.SelfAttention\.",
        "a text encoder alone: give the whole checkpoint",
    ),
    (r"^\.(vision_model|visual)\.", "CLIP's image encoder: give the base"),
    (r"^\.(unet|text_encoder)\.", f"an incomplete folder in diffusers' layout: {WHOLE_FOLDER}"),
)


def kind(checkpoint: Checkpoint) -> str:
    """What a file seems to be, for the error where another kind was expected."""
    found = pretender(checkpoint) or other_pipeline(checkpoint) or matching(checkpoint, KINDS)
    if found:
        return found
    if not checkpoint.keys:
        return "a file without tensors: get the model again"
    keys = f"{counted(len(checkpoint.keys), 'key')}: {first_few(sorted(checkpoint.keys))}"
    if len(checkpoint.keys) <= 2 and all(
        tensor.shape[-1:] in ((768,), (1024,)) for tensor in checkpoint.tensors.values()
    ):
        return TEXTUAL_INVERSION
    return f"something unknown ({keys}), expected keys of the original layout or diffusers'"


def pretender(checkpoint: Checkpoint) -> str | None:
    """What a file is that looks like a base or a ControlNet but is for another family or use; None for all others."""
    found = matching(checkpoint, PRETENDERS)
    if found:
        return found
    family = matching(checkpoint, OTHER_FAMILIES)
    if family is None:
        return None
    if matching(checkpoint, ((ANY_CONTROL, "control"),)):
        return f"a ControlNet for {family}, and {ONLY}: get the one for your base"
    return of_family(family)


def of_family(family: str) -> str:
    return f"{'an' if family.startswith('SD') else 'a'} {family} checkpoint, and {ONLY}: give one of these, like sd15"


def other_pipeline(checkpoint: Checkpoint) -> str | None:
    """By the class of pipeline that a folder is for, if no UNet of ours is in it."""
    name = checkpoint.configs.get("pipeline", {}).get("_class_name")
    if not isinstance(name, str) or checkpoint.any_key("unet."):
        return None
    for start, family in PIPELINES:
        if name.startswith(start):
            return of_family(family)
    return None if name.startswith("StableDiffusion") else f"a pipeline of the class {name:.80}, and {ONLY}"


def matching(checkpoint: Checkpoint, rows: Rows) -> str | None:
    lines = "".join(f".{key}\n" for key in checkpoint.tensors)  # one search a pattern, not one a key
    for patterns, what in rows:
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        if all(re.search(pattern, lines, re.MULTILINE) for pattern in patterns):
            return what
    return None


# ------------------------------------------------------------------------------------- sizes of other families and uses

# The width of the prompt's context, by which the families differ.
FAMILIES = {SD15.unet.context_width: "SD 1.x", SD21.unet.context_width: "SD 2.x"}
# What a UNet is for that reads more than a latent of 4 channels, and what does the same here.
OTHER_USES = {
    5: ("a depth", ", with a depth control"),
    7: ("an upscaling", ""),
    8: ("an instruction (InstructPix2Pix)", ", with the ip2p control"),
    9: ("an inpainting", ""),
}


def input_channels(checkpoint: Checkpoint) -> int | None:
    """Of a base's UNet; None without a first convolution."""
    keys = ("model.diffusion_model.input_blocks.0.0.weight", "unet.conv_in.weight")
    shapes = (checkpoint.shape(key) for key in keys if key in checkpoint.tensors)
    return next((shape[1] for shape in shapes if len(shape) == 4), None)


def other_use(channels: int) -> str | None:
    """Of a UNet that reads so many channels; None if it is that of a text-to-image model."""
    if channels == 4:
        return None
    use, instead = OTHER_USES.get(channels, ("another", ""))
    return (
        f"{use} model with {channels} input channels, expected a text-to-image model with 4: give the base that it was "
        f"made from{instead}"
    )


def made_for(context_width: int) -> str:
    return f"{FAMILIES.get(context_width, 'a model')} (context width {context_width})"
