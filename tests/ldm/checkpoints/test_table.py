"""What people have: one line a case. Each is a checkpoint made from keys and shapes alone, and costs milliseconds."""

import json
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from reference import load_manifest
from small import error_of, small_sd
from written import without_metadata

from controlnet.layouts import check_family, recognise_control
from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.diffusers import WEIGHTS_NAME
from ldm.checkpoints.load import IGNORED_BESIDE_BASE, check_keys, warn_of_left_out, without_weights
from ldm.checkpoints.lora import changes_of, modules_by_name
from ldm.checkpoints.open import Checkpoint
from ldm.checkpoints.recognise import identify, open_base
from ldm.checkpoints.spellings import respelled
from ldm.checkpoints.stored import CheckpointError, StoredTensor
from ldm.config import SD15, SD15_INPAINTING, SD20_BASE, SD20_INPAINTING, SD21, SD21_BASE, TINY
from tools.description import contents

PATH = Path("file.safetensors")
SD1, SD2 = "ldm_sd15_checkpoint", "ldm_sd21_checkpoint"
CONTROL1, CONTROL2 = "ldm_control_sd15_control_only", "ldm_control_sd21_control_only"
CONFIGS = {SD1: SD15, SD2: SD21, CONTROL1: SD15, CONTROL2: SD21}


def stand_in(shapes, metadata=None, configs=None, integers=()):
    """As `open_checkpoint` returns it."""

    def stored(key, shape):
        return StoredTensor(PATH, torch.int64 if key in integers else torch.float16, tuple(shape), None)

    tensors = respelled({key: stored(key, shape) for key, shape in shapes.items()}, "", PATH)
    return Checkpoint(PATH, tensors, metadata or {}, configs or {})


@cache
def empty(config):
    with without_weights():
        return StableDiffusion(config)


def verdict_as_base(checkpoint):
    """-> the configuration, and the warnings that loading would give."""
    base = identify(checkpoint)
    sd = empty(base.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base.warn()
        warn_of_left_out(checkpoint, check_keys(checkpoint, sd.parts_in(checkpoint), IGNORED_BESIDE_BASE))
    return base.config, [str(warning.message) for warning in caught]


def verdict_as_control(checkpoint, config=SD15):
    """-> the warnings that loading it for such a base would give."""
    found = recognise_control(checkpoint)
    check_family(checkpoint, found, config.unet)
    whole, *part = ControlNet.to_fill(checkpoint, found, empty(config).unet)
    left_out = check_keys(whole, [part], found.ignored)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_left_out(checkpoint, left_out)
    return [str(warning.message) for warning in caught]


# ------------------------------------------------------------------------------ sound files with something more in them

CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
TOKENS = f"{CLIP}text_model.embeddings.token_embedding.weight"
# name: (manifest, what is added, of a type that is not a number of weights, words of the one warning)
MORE = {
    "logit_scale and projection of ComfyUI": (
        SD1,
        {"cond_stage_model.logit_scale": (), f"{CLIP}text_projection.weight": (768, 768)},
        (),
        "cond_stage_model.logit_scale, cond_stage_model.transformer.text_projection.weight",
    ),
    "an int64 logit_scale": (SD2, {}, (f"{OPEN_CLIP}logit_scale",), f"{OPEN_CLIP}logit_scale"),
    "a logit_scale of another shape": (SD2, {f"{OPEN_CLIP}logit_scale": (1,)}, (), f"{OPEN_CLIP}logit_scale"),
    "position ids of SD 2": (SD2, {f"{OPEN_CLIP}transformer.text_model.embeddings.position_ids": (1, 77)}, (), "ids"),
    "an embedding manager": (SD1, {"embedding_manager.x": (3,)}, (), "left out: embedding_manager.x"),
    "many": (SD1, {f"loss.{i}": (3,) for i in range(9)}, (), "loss.0, loss.1, loss.2, ... (9 in all)"),
    "a stray LoRA": (SD1, {"lora_te_text_model_x.alpha": ()}, (), "left out: lora_te_text_model_x.alpha"),
    "optimizer states": (SD1, {"optimizer.state.0.exp_avg": (3,)}, (), "left out: optimizer.state.0.exp_avg"),
    "EMA's bookkeeping": (SD1, {"model_ema.decay": (), "model_ema.diffusion_modeloutbias": (4,)}, (), None),
    "one token more": (SD1, {TOKENS: (49409, 768)}, (), f"left out: {TOKENS}[49408:]"),
    "two tokens more": (
        SD2,
        {f"{OPEN_CLIP}token_embedding.weight": (49410, 1024)},
        (),
        "weight[49408:]",
    ),
    "a mark, and what ControlNet's first files have": (SD1, {"v_pred": (0,), "logvar": (1000,)}, (), None),
    "a control's leftovers": (
        CONTROL1,
        {"loss.x": (3,), "control_model.y": ()},
        (),
        "left out: control_model.y, loss.x",
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_sound_files_with_something_more_in_them(name):
    manifest, more, integers, words = MORE[name]
    checkpoint = stand_in({**load_manifest(manifest), **more}, {"modelspec.prediction_type": "v"}, integers=integers)
    warned = verdict_as_control(checkpoint) if manifest == CONTROL1 else verdict_as_base(checkpoint)[1]
    assert len(warned) == (words is not None)
    assert words is None or (words in warned[0] and "damaged" not in warned[0] and "\n" not in warned[0])


UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
# name: (manifest, a key, its new shape or None for none, words)
LESS = {
    "one token less": (SD1, TOKENS, (49407, 768), "1 key misshapen"),
    "no norm": (
        SD1,
        f"{UNET}out.0.bias",
        None,
        "it is damaged, or made for another architecture: 1 key",
    ),
    "a used integer": (SD1, f"{UNET}out.0.bias", "integer", "1 key not of a floating-point type"),
    "eight channels": (SD1, FIRST, (320, 8, 3, 3), "InstructPix2Pix"),
    "five channels": (SD2, FIRST, (320, 5, 3, 3), "it is a depth model"),
    "rows of q, k and v": (SD2, f"{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_bias", (1024,), "expected [3072]"),
    "another context": (
        SD1,
        CONTEXT,
        (320, 1024),
        "it is SD 1.x (context width 768), expected SD 2.x (context width 1",
    ),
    "no autoencoder": (SD1, "first_stage_model.", None, "it has no autoencoder (or another one), expected a whole"),
    "no autoencoder, the remedy": (SD1, "first_stage_model.", None, ": give one with --vae FILE"),
    "a UNet alone": (SD1, ("first_stage_model.", "cond_"), None, "it has no autoencoder and no text encoder (or"),
    "no text encoder": (SD1, "cond_stage_model.", None, "it has no text encoder"),
}


@pytest.mark.parametrize("name", LESS)
def test_files_that_lack_something(name):
    manifest, start, shape, words = LESS[name]
    shapes = load_manifest(manifest)
    integers = [start] if shape == "integer" else []
    if shape is None:
        shapes = {key: value for key, value in shapes.items() if not key.startswith(start)}
    elif shape != "integer":
        shapes[start] = shape
    checkpoint = stand_in({**shapes, "loss.x": (1,)}, integers=integers)
    assert words in error_of(verdict_as_base, checkpoint)


# --------------------------------------------------------------------------------------------------------- wrappers

WRAPPED = {
    "DistributedDataParallel": (CONTROL1, lambda key: f"module.{key}"),
    "torch.compile": (CONTROL1, lambda key: f"_orig_mod.{key}"),
    "both, and inside": (
        CONTROL1,
        lambda key: "module." + key.replace("model.", "model._orig_mod."),
    ),
    "compiled in DistributedDataParallel": (CONTROL1, lambda key: f"_orig_mod.module.{key}"),
    "and block by block": (CONTROL1, lambda key: re.sub(r"(blocks\.\d+)", r"\1._orig_mod.module", key)),
    "a trainer's attribute": (CONTROL1, lambda key: key.replace("control_model.", "model.")),
    "a trainer's attribute twice": (CONTROL1, lambda key: f"model.net.{key}"),
    "an attribute called controlnet": (CONTROL1, lambda key: key.replace("control_model.", "controlnet.")),
    "without a prefix": (CONTROL2, lambda key: key.removeprefix("control_model.")),
    "DeepSpeed": (CONTROL2, lambda key: f"module.{key}"),
    "a base in params": (SD1, lambda key: f"params.{key}"),
    "a base in a model's state_dict": (SD2, lambda key: f"model.state_dict.{key}"),
    "SD-Turbo": (SD2, lambda key: key.replace("cond_stage_model.", "conditioner.embedders.0.")),
    "SD 1.x in the layout of SD-Turbo": (SD1, lambda key: key.replace("cond_stage_model.", "conditioner.embedders.0.")),
    "without the text model's outer level": (SD1, lambda key: key.replace("text_model.", "")),
    "diffusers' control": ("diffusers_sd15_controlnet", lambda key: f"module.{key}"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_files_load_without_a_word(name):
    manifest, rename = WRAPPED[name]
    checkpoint = stand_in({rename(key): shape for key, shape in load_manifest(manifest).items()}, SAYS_V)
    if manifest in (SD1, SD2):
        config, warned = verdict_as_base(checkpoint)
        assert config.unet == CONFIGS[manifest].unet
    else:
        warned = verdict_as_control(checkpoint, CONFIGS.get(manifest, SD15))
    assert warned == []


SAYS_V = {"modelspec.predict_key": "v"}


@pytest.mark.parametrize(("manifest", "config"), [(SD1, SD15_INPAINTING), (SD2, SD20_INPAINTING)])
def test_inpainting_bases_load_without_a_word(manifest, config):
    assert verdict_as_base(stand_in(load_manifest(manifest) | NINE)) == (config, [])


@pytest.mark.parametrize("manifest", [CONTROL1, CONTROL2])
def test_control_loras_load_without_a_word(manifest):
    shapes = {"lora_controlnet": (0,)}
    for key, shape in load_manifest(manifest).items():
        key = key.removeprefix("control_model.")
        if len(shape) > 1 and not key.startswith(("input_hint_block.", "zero_convs.", "middle_block_out.")):
            stem = key.removesuffix(".weight")
            shapes |= {f"{stem}.up": (shape[0], 128, *(1,) * (len(shape) - 2)), f"{stem}.down": (128, *shape[1:])}
        else:
            shapes[key] = shape
    checkpoint = stand_in(shapes)
    assert verdict_as_control(checkpoint, CONFIGS[manifest]) == []
    assert contents(checkpoint).kind == "ControlNet"
    other = SD21 if manifest == CONTROL1 else SD15
    assert "is a ControlNet for SD" in error_of(verdict_as_control, checkpoint, other)


def test_weights_come_before_their_moving_average():
    shapes = load_manifest(CONTROL1)
    both = {f"{outer}.{key}": shape for outer in ("params", "params_ema") for key, shape in shapes.items()}
    (warned,) = verdict_as_control(stand_in(both))
    assert "params_ema.control_model." in warned and f"({len(shapes)} in all)" in warned


# ------------------------------------------------------------------------------------------- what the prediction is

SD2_KEYS, SD1_KEYS = {CONTEXT: (320, 1024)}, {CONTEXT: (320, 768)}
NINE = {FIRST: (320, 9, 3, 3)}
SGM = {"conditioner.embedders.0.model.ln_final.bias": (1024,)}
# (more keys, metadata, the name's preset) -> configuration, zero terminal SNR, who says it
PREDICTIONS = [
    (SD2_KEYS, {}, None, "v", False, "assumed"),
    (SD2_KEYS, {}, SD21_BASE, "eps", False, "the file's name"),
    (SD2_KEYS, {"modelspec.prediction_type": "epsilon"}, SD21, "eps", False, "modelspec.prediction_type"),
    (SD2_KEYS, {"modelspec.prediction_type": "v"}, SD21_BASE, "v", False, "modelspec.prediction_type"),
    (SD2_KEYS, {"modelspec.predict_key": "epsilon"}, None, "eps", False, "modelspec.predict_key"),
    (SD2_KEYS | {"v_pred": (0,)}, {}, SD21_BASE, "v", False, "the tensor v_pred"),
    (SD2_KEYS | {"v_pred": (0,), "ztsnr": (0,)}, {}, None, "v", True, "the tensor v_pred"),
    (SD2_KEYS | {"ztsnr": (0,)}, {}, None, "v", True, "the tensor ztsnr"),
    (SD2_KEYS | SGM, {}, None, "eps", False, "SD-Turbo"),
    (SD2_KEYS, {"config": json.dumps(SD20_BASE.to_dict())}, SD21, "eps", False, "the metadata"),
    (SD1_KEYS, {}, None, "eps", False, "its family"),
    (SD1_KEYS | {"v_pred": (0,)}, {}, None, "v", False, "the tensor v_pred"),
    (SD1_KEYS, {"modelspec.predict_key": "v"}, None, "v", False, "modelspec.predict_key"),
    (SD2_KEYS | NINE, {}, None, "eps", False, "its family"),
    (SD2_KEYS | NINE, {"modelspec.predict_key": "v"}, None, "v", False, "modelspec.predict_key"),
]


@pytest.mark.parametrize(("keys", "metadata", "preset", "prediction", "zero_snr", "source"), PREDICTIONS)
def test_what_a_base_predicts(keys, metadata, preset, prediction, zero_snr, source):
    base = identify(stand_in(keys, metadata), preset=preset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base.warn()
    assert bool(caught) == (source == "assumed")
    schedule = base.config.schedule
    assert (schedule.prediction, schedule.zero_terminal_snr) == (prediction, zero_snr)
    assert source in base.prediction_source
    said = identify(stand_in(keys, metadata), "eps", preset=preset)
    assert (said.config.schedule.prediction, said.prediction_source) == ("eps", "the caller")


def test_the_configuration_of_sd2_follows_from_what_it_predicts():
    for prediction, config in ((None, SD21), ("v", SD21), ("eps", SD21_BASE)):
        assert identify(stand_in(SD2_KEYS), prediction).config == config


def test_zero_snr_by_the_caller():
    assert identify(stand_in(SD2_KEYS), "v", zero_snr=True).config.schedule.zero_terminal_snr
    sentence = error_of(identify, stand_in(SD1_KEYS), zero_snr=True)
    assert "with prediction eps cannot" in sentence and "leave out --zero-snr, or say --prediction v" in sentence


def test_eps_by_the_caller_for_a_base_with_zero_snr(tmp_path):
    small_sd().save(tmp_path / "own.safetensors")  # predicts v, with zero terminal SNR
    small_sd().save(tmp_path / "folder", layout="diffusers")
    without_metadata(tmp_path / "folder/unet" / WEIGHTS_NAME)  # the scheduler tells
    for path in (tmp_path / "own.safetensors", tmp_path / "folder"):
        assert error_of(open_base, path, "eps").endswith("for models that predict v: leave out --prediction eps")
    assert 'the prediction is "noise", expected eps, v or x0' in error_of(open_base, tmp_path / "folder", "noise")
    assert open_base(tmp_path / "folder", "v_prediction").config.schedule.prediction == "v"


# ------------------------------------------------------------------------------------ files of other kinds and families

HINT = "controlnet_cond_embedding.conv_in.weight"
LDM_HINT = "control_model.input_hint_block.0.weight"
# what it is: (its keys, words of the sentence as --base, words as --control)
OTHERS = {
    "SDXL": (
        [f"{UNET}x", "conditioner.embedders.1.model.x"],
        "an SDXL checkpoint, and only SD 1.x",
        "an SDXL checkpoint",
    ),
    "SDXL in diffusers' layout": (["unet.add_embedding.linear_1.weight"], "an SDXL checkpoint", "an SDXL checkpoint"),
    "its refiner": (
        [f"{UNET}x", "conditioner.embedders.0.model.x", f"{UNET}label_emb.0.0.weight"],
        "an SDXL refiner checkpoint",
        "an SDXL refiner checkpoint",
    ),
    "SDXL's control": ([HINT, "add_embedding.linear_1.weight"], "a ControlNet for SDXL", "get the one for your base"),
    "SDXL's control, original": ([LDM_HINT, "control_model.label_emb.0.0.weight"], "for SDXL", "for SDXL"),
    "SDXL Union": ([HINT, "add_embedding.linear_1.weight", "task_embedding"], "Union for SDXL", "Union for SDXL"),
    "SDXL ProMax": (
        [HINT, "control_add_embedding.linear_1.weight"],
        "Union for SDXL",
        "get the ControlNet for",
    ),
    "SDXL's Control-LoRA": (
        ["lora_controlnet", "input_hint_block.0.weight", "label_emb.0.0.up"],
        "a ControlNet for SDXL",
        "a ControlNet for SDXL",
    ),
    "a Control-LoRA as base": (["lora_controlnet", "input_hint_block.0.weight"], "pass it as --control", None),
    "LLLite": (["lllite_unet_x.down.0.weight"], "a ControlNet-LLLite", "get a ControlNet"),
    "XS": ([LDM_HINT, "enc_zero_convs_out.0.weight"], "a ControlNet-XS", "get a ControlNet"),
    "XS of diffusers": ([HINT, "down_blocks.0.ctrl_to_base.0.weight"], "a ControlNet-XS", "get a ControlNet"),
    "SparseCtrl": ([HINT, "down_blocks.0.motion_modules.0.x"], "a SparseCtrl", "get a ControlNet"),
    "AnimateDiff": (["down_blocks.0.motion_modules.0.x"], "a motion module", "a motion module"),
    "Uni-ControlNet": ([f"{UNET}x", "local_adapter.x"], "a Uni-ControlNet", "a ControlNet for each kind"),
    "BrushNet": (["brushnet_down_blocks.0.weight", "conv_in_condition.weight"], "a BrushNet", "a BrushNet"),
    "SD 3": ([f"{UNET}x", f"{UNET}joint_blocks.0.x"], "an SD 3 checkpoint", "an SD 3 checkpoint"),
    "SD 3's control": (["pos_embed.proj.weight", "controlnet_blocks.0.weight"], "for SD 3", "a ControlNet for SD 3"),
    "Flux": (["double_blocks.0.img_mod.lin.weight"], "a Flux checkpoint", "a Flux checkpoint"),
    "Flux's control": (["controlnet_x_embedder.weight"], "a ControlNet for Flux", "a ControlNet for Flux"),
    "unCLIP": ([f"{UNET}x", "embedder.model.visual.proj"], "an SD unCLIP checkpoint", "an SD unCLIP"),
    "unCLIP of diffusers": (["unet.class_embedding.linear_1.weight"], "an SD unCLIP checkpoint", "an SD unCLIP"),
    "Stable Video Diffusion": ([f"{UNET}x", f"{UNET}x.time_stack.0.x"], "a Stable Video", "a Stable Video"),
    "scaled fp8": ([f"{UNET}x", "scaled_fp8"], "in scaled fp8", "in scaled fp8"),
    "LCM": (["unet.time_embedding.cond_proj.weight"], "(LCM)", "(LCM)"),
    "GLIGEN": ([f"{UNET}x", f"{UNET}x.fuser.linear.weight"], "a GLIGEN model", "a GLIGEN model"),
    "x2 upscaler": (
        ["unet.down_blocks.0.resnets.0.norm1.linear.weight", "vae.x", "text_encoder.x"],
        "an upsc",
        "an upsc",
    ),
    "x4 upscaler": ([f"{UNET}x", f"{UNET}label_emb.weight"], "an upscaler", "an upscaler"),
    "depth2img": ([f"{UNET}x", "depth_model.model.x"], "depth2img", "depth2img"),
    "image variations": ([f"{UNET}x", "cond_stage_model.model.visual.proj"], "varies images", "varies images"),
    "hypernetwork": (["320.0.linear.0.weight"], "a hypernetwork", "a hypernetwork"),
    "ESRGAN": (["params_ema.conv_first.weight"], "(ESRGAN)", "(ESRGAN)"),
    "a compact ESRGAN": (["params.body.0.weight"], "(ESRGAN)", "(ESRGAN)"),
    "a mender of faces": (["params_ema.stylegan_decoder.x"], "mends faces", "mends faces"),
    "T2I-Adapter": (["body.0.block1.weight"], "a T2I-Adapter", "get the ControlNet for the same"),
    "T2I-Adapter of diffusers": (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter", "a T2I-Adapter"),
    "T2I-Adapter of styles": (["style_embedding", "proj"], "a T2I-Adapter", "a T2I-Adapter"),
    "IP-Adapter": (["image_proj.proj.weight"], "an IP-Adapter", "an IP-Adapter"),
    "IP-Adapter with a LoRA in it": (
        ["image_proj.norm.weight", "ip_adapter.0.to_q_lora.down.weight"],
        "an IP-Adapter",
        "an IP-Adapter",
    ),
    "LoRA": (["lora_unet_x.lora_up.weight"], "pass it as --lora", "pass it as --lora"),
    "LoRA of diffusers": (["down_blocks.0.lora.down.weight"], "pass it as --lora", "pass it as --lora"),
    "LoRA of PEFT": (["unet.x.lora_A.weight"], "pass it as --lora", "pass it as --lora"),
    "LyCORIS": (["x.hada_w1_a"], "pass it as --lora", "pass it as --lora"),
    "textual inversion": (["emb_params"], "pass it as --embedding", "pass it as --embedding"),
    "textual inversion of diffusers": (["<cat>"], "pass it as --embedding", "pass it as --embedding"),
    "its first pickles": (["string_to_token.*", "string_to_param.*"], "as --embedding", "as --embedding"),
    "autoencoder": (["decoder.mid.block_1.x"], "pass it as --vae", "pass it as --vae"),
    "autoencoder, prefixed": (["first_stage_model.decoder.up.0.x"], "pass it as --vae", "pass it as --vae"),
    "TAESD": (["decoder.layers.0.weight"], "a small autoencoder (TAESD)", "TAESD"),
    "TAESD's decoder": (["1.weight", "3.conv.0.weight"], "a small autoencoder (TAESD)", "TAESD"),
    "OpenPose": (["model0.conv1_1.weight"], "make_hints", "make_hints"),
    "CLIP's images": (["visual.conv1.weight"], "CLIP's image encoder", "CLIP's image encoder"),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a text encoder alone", "a text encoder alone"),
    "Stable Cascade": (
        ["clip_txt_mapper.weight", "down_blocks.0.0.channelwise.0.weight"],
        "a Stable Cascade",
        "Cascade",
    ),
    "Wan": (["blocks.0.cross_attn.k.weight", "patch_embedding.weight"], "transformer's", "transformer's checkpoint"),
    "Lumina": (["layers.0.attention.qkv.weight", "cap_embedder.0.weight"], "transformer's", "transformer's checkpoint"),
    "a control as base": ([HINT], "a ControlNet: pass it as --control", None),
    "a control as base, original": ([LDM_HINT], "a ControlNet: pass it as --control", None),
    "MiDaS": (["pretrained.model.x"], "make_hints", "make_hints"),
    "an upscaler of diffusers": (["unet.class_embedding.weight"], "an upscaler", "an upscaler"),
    "an old ESRGAN": (["body.0.rdb1.conv1.weight"], "(ESRGAN)", "(ESRGAN)"),
    "optimizer": (["state.0.exp_avg"], "the state of an optimizer", "the state of an optimizer"),
    "a UNet of diffusers": (["down_blocks.0.resnets.0.conv1.weight"], "a UNet in diffusers' layout", "give the folder"),
    "another architecture": (
        [f"{UNET}x", "first_stage_model.encoder.down.0.x", "cond_stage_model.x"],
        "a diffusion model of another architecture",
        "of another architecture",
    ),
    "unknown": (["encoder.weight"], "something unknown (1 key: encoder.weight), expected keys of the", "unknown"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_used_says_what_it_is_and_what_would_fit(name):
    keys, as_base, as_control = OTHERS[name]
    checkpoint = stand_in(dict.fromkeys(keys, (1,)))
    sentence = error_of(identify, checkpoint)
    assert "is not a base model of SD 1.x or 2.x: it is" in sentence and as_base in sentence
    assert "pass it as --control" not in sentence or as_control is None
    if as_control is not None:
        sentence = error_of(recognise_control, checkpoint)
        assert "holds no ControlNet" in sentence and as_control in sentence
        assert "pass it as --base" not in sentence or "--vae" in sentence  # which would only send it back
        assert as_control in contents(checkpoint).kind  # the describing tool agrees


@pytest.mark.parametrize("key", [CONTEXT, "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"])
def test_a_base_as_anything_else_is_named_as_one(key):
    checkpoint = stand_in({key: (320, 768), "text_encoder.x": (1,), "vae.x": (1,)})
    modules = modules_by_name(empty(SD15).unet, empty(SD15).text_encoder)
    assert error_of(changes_of, checkpoint, modules).endswith("is not a LoRA: it is a base model: pass it as --base")


PIPELINES = {"StableDiffusion3Pipeline": "SD 3", "FluxPipeline": "Flux", "KandinskyPipeline": "the class Kandinsky"}


@pytest.mark.parametrize("name", PIPELINES)
def test_folders_of_other_pipelines(name):
    checkpoint = stand_in({"vae.decoder.conv_in.weight": (1,)}, configs={"pipeline": {"_class_name": name}})
    assert PIPELINES[name] in error_of(identify, checkpoint)


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (4, "a base model without one: pass it as --base"),
        (5, "a depth model with 5 input channels"),
        (9, "a base model for inpainting, without one: pass it as --base, with --init and --mask"),
    ],
)
def test_a_base_as_control(channels, words):
    sentence = error_of(recognise_control, stand_in({CONTEXT: (320, 768), FIRST: (320, channels, 3, 3)}))
    assert words in sentence and ("pass it as --base" in sentence) == (channels != 5)


@pytest.mark.parametrize(
    ("manifest", "config", "words"),
    [
        (
            CONTROL1,
            SD21,
            "is a ControlNet for SD 1.x, and your base is SD 2.x: give --base sd15, or another of its family",
        ),
        (CONTROL1, TINY, "is a ControlNet for SD 1.x, and your base is tiny: give --base sd15"),
        (CONTROL2, TINY, "is a ControlNet for SD 2.x, and your base is tiny: give --base sd21-base"),
        (CONTROL2, SD15, "is a ControlNet for SD 2.x, and your base is SD 1.x"),
    ],
)
def test_a_control_of_another_family_names_the_base(manifest, config, words):
    assert words in error_of(verdict_as_control, stand_in(load_manifest(manifest)), config)


# ------------------------------------------------------------------------------------------------------- differences


def test_a_difference_may_lack_what_is_zero():
    shapes = {**load_manifest(CONTROL1), "difference": (1,)}
    some = {key: shape for key, shape in shapes.items() if "input_blocks.1" not in key}
    assert verdict_as_control(stand_in(some)) == []
    assert "left out: loss.x" in verdict_as_control(stand_in({**some, "loss.x": (1,)}))[0]
    assert "1 key unexpected" in error_of(
        verdict_as_control, stand_in({**some, "control_model.input_bl0cks.1.x": (1,)})
    )
    del some["control_model.zero_convs.0.0.bias"]
    assert "1 key missing" in error_of(verdict_as_control, stand_in(some))
    del shapes["control_model.input_blocks.1.0.in_layers.0.bias"], shapes["difference"]
    with pytest.raises(CheckpointError, match="1 key missing"):
        verdict_as_control(stand_in(shapes))
