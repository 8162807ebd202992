"""Proof against software that nobody here wrote: diffusers and transformers read what we save and compute the same, and
we read what they save.

Models are the miniatures of the reference numbers, SD 1.x and SD 2.x. Runs where tests/requirements-interop.txt is
installed.
"""

import os
import re
from copy import deepcopy
from functools import cache

import pytest
import torch
from minis import relative
from PIL import Image
from reference import MINI_SD1, MINI_SD2, filled_checkpoint, load_manifest
from safetensors.torch import load_file, save_file
from small import assert_same, for_inpainting, small_control, small_sd

from controlnet.config import ControlConfig
from controlnet.guidance import Control, guided
from controlnet.inference import generate as generate_module
from controlnet.inference.image_to_image import Init
from controlnet.inference.prompts import encode_prompts
from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.checkpoints.lora import merge_loras, read_loras
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.textual_inversion import read_embedding
from ldm.embeddings import with_embeddings
from ldm.samplers import ddim_timesteps, sample_loop

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: a missing file must fail here
os.environ["TQDM_DISABLE"] = "1"
REASON = "tests/requirements-interop.txt is not installed"
diffusers = pytest.importorskip("diffusers", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
pipeline_stable_diffusion_inpaint = pytest.importorskip(
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint", reason=REASON
)
pipeline_controlnet_inpaint = pytest.importorskip(
    "diffusers.pipelines.controlnet.pipeline_controlnet_inpaint", reason=REASON
)

MINIS = {"sd1": MINI_SD1, "sd2": MINI_SD2}
PROMPTS = ["a red circle, 2 cafés", "", "one thing after the other " * 30]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Pair:
    """One base with its ControlNet: ours, the files in both layouts, and diffusers' reading of its own layout."""

    def __init__(self, folder, style):
        self.file = filled_checkpoint(load_manifest(f"mini_{style}_checkpoint"), folder / "base.safetensors")
        manifest = load_manifest(f"mini_{style}_control_only")
        self.control_file = filled_checkpoint(manifest, folder / "control.safetensors")
        self.sd = StableDiffusion.from_checkpoint(open_checkpoint(self.file), MINIS[style])
        self.control = ControlNet.load(self.control_file, self.sd.unet).requires_grad_(False)
        self.folder, self.control_folder = folder / "base", folder / "control"
        self.sd.save(self.folder, layout="diffusers")
        self.control.save(self.control_folder, layout="diffusers")
        self.theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
            self.folder, controlnet=diffusers.ControlNetModel.from_pretrained(self.control_folder)
        )
        self.theirs.set_progress_bar_config(disable=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By style, each made once: tests do not change them."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    return cache(lambda style: Pair(tmp_path_factory.mktemp(style), style))


@pytest.fixture(params=MINIS)
def pair(request, pairs):
    return pairs(request.param)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network_inputs(sd):
    hint = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return noise(2, 4, 8, 8), torch.tensor([501, 37]), noise(2, 77, sd.config.unet.context_width, seed=2), hint


UNUSED = ("text_encoder.blocks.2.", "text_encoder.text_projection", "text_encoder.logit_scale")


def unused(sd):
    """What diffusers' layout does not hold of SD 2.x."""
    return UNUSED if sd.config.text.family == "open_clip" else ()


# ---------------------------------------------------------------------------------------------- from us to them


@torch.no_grad()
def test_diffusers_computes_the_same_networks(pair):
    x, t, context, hint = network_inputs(pair.sd)
    residuals = pair.control(x, t, context, hint)
    down, middle = pair.theirs.controlnet(x, t, context, hint, return_dict=False)
    assert all(relative(a, b) < 2e-5 for a, b in zip(residuals, [*down, middle], strict=True))
    theirs = pair.theirs.unet(
        x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    assert relative(pair.sd.unet(x, t, context, residuals), theirs) < 2e-5
    assert relative(pair.sd.unet(x, t, context), theirs) > 1e-3  # the control had an effect


@torch.no_grad()
def test_diffusers_computes_the_same_autoencoder(pair):
    images = noise(1, 3, 64, 96).clamp(-1, 1)
    ours, theirs = pair.sd.vae.posterior(images), pair.theirs.vae.encode(images).latent_dist
    assert relative(ours.mean, theirs.mean) < 2e-5
    assert relative(ours.logvar, theirs.logvar) < 2e-5
    latents = noise(1, 4, 8, 12)
    factor = pair.theirs.vae.config.scaling_factor
    assert relative(pair.sd.decode(latents), pair.theirs.vae.decode(latents / factor).sample) < 2e-5


@torch.no_grad()
def test_transformers_reads_the_same_prompts(pair):
    ids = pair.theirs.tokenizer(
        PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(ids, pair.sd.tokenizer(PROMPTS))
    assert relative(pair.sd.encode_text(PROMPTS), pair.theirs.text_encoder(ids)[0]) < 2e-5


@torch.no_grad()
def test_five_controlled_steps_are_those_of_diffusers_pipeline(pair):
    sd, cfg, scale = pair.sd, 4.0, 0.8
    x, hint = noise(1, 4, 8, 8), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    prompt, negative = sd.encode_text(["a red circle"]), sd.encode_text(["blue"])
    denoise = guided(sd.unet, prompt, negative, cfg, [Control(pair.control, hint, scale)])
    latents = sample_loop("ddim", denoise, x, ddim_timesteps(sd.schedule, 5), sd.schedule)
    theirs = pair.theirs(
        "a red circle",
        image=hint,
        negative_prompt="blue",
        guidance_scale=cfg,
        controlnet_conditioning_scale=scale,
        num_inference_steps=5,
        latents=x.clone(),
        output_type="latent",
    ).images
    assert relative(latents, theirs) < 5e-5


@torch.no_grad()
def test_diffusers_reads_the_original_layout(pair, tmp_path):
    """Its single-file loaders, with the architecture from the folder: they know the published ones only."""
    x, t, context, hint = network_inputs(pair.sd)
    pair.sd.save(tmp_path / "base.safetensors")
    pair.control.save(tmp_path / "control.safetensors")
    single = {"local_files_only": True}
    unet = diffusers.UNet2DConditionModel.from_single_file(
        str(tmp_path / "base.safetensors"), config=str(pair.folder), subfolder="unet", **single
    )
    assert relative(pair.sd.unet(x, t, context), unet(x, t, context).sample) < 2e-5
    vae = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "base.safetensors"), config=str(pair.folder), subfolder="vae", **single
    )
    assert relative(pair.sd.vae.decoder(x), vae.decoder(x)) < 2e-5
    control = diffusers.ControlNetModel.from_single_file(
        str(tmp_path / "control.safetensors"), config=str(pair.control_folder), **single
    )
    down, middle = control(x, t, context, hint, return_dict=False)
    assert relative(pair.control(x, t, context, hint)[-1], middle) < 2e-5


def test_diffusers_converts_the_text_encoder_of_the_original_layout(pair, tmp_path):
    from diffusers.loaders import single_file_utils as converters

    pair.sd.save(tmp_path / "base.safetensors")
    tensors = load_file(tmp_path / "base.safetensors")
    if pair.sd.config.text.family == "clip":
        found = converters.convert_ldm_clip_checkpoint(tensors)
    else:
        # Their list of unused layers is that of the published model, so the miniature's last one stays in.
        found = converters.convert_open_clip_checkpoint(pair.theirs.text_encoder, tensors)
    found = {key.removeprefix("text_model."): value for key, value in found.items()}
    wanted = {key.removeprefix("text_model."): v for key, v in pair.theirs.text_encoder.state_dict().items()}
    assert wanted.keys() - {"embeddings.position_ids"} <= found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted.keys() & found.keys())


def test_global_average_pooling_is_a_field_of_both(pair, tmp_path):
    control = ControlNet(pair.sd.unet, ControlConfig(global_average_pooling=True))
    control.load_state_dict(pair.control.state_dict())
    control.save(tmp_path / "control", layout="diffusers")
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "control")
    assert theirs.config.global_pool_conditions
    x, t, context, hint = network_inputs(pair.sd)
    with torch.no_grad():
        down, middle = theirs(x, t, context, hint, return_dict=False)
        ours = control(x, t, context, hint)
    # One number a channel; theirs and ours both spread it over the positions when it is added.
    assert ours[0].shape[-2:] == (1, 1)
    assert all(relative(a, b) < 2e-5 for a, b in zip(ours, [*down, middle], strict=True))
    theirs.save_pretrained(tmp_path / "again")
    assert ControlNet.load(tmp_path / "again", pair.sd.unet).config.global_average_pooling


# ---------------------------------------------------------------------------------------------- from them to us


@pytest.mark.parametrize(
    "pair, arguments, file",
    [
        ("sd1", {}, "diffusion_pytorch_model.safetensors"),
        ("sd2", {"safe_serialization": False}, "diffusion_pytorch_model.bin"),
        ("sd1", {"max_shard_size": "5MB", "variant": "fp16"}, "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ],
    indirect=["pair"],
)
def test_we_read_what_diffusers_saves(pair, tmp_path, arguments, file):
    if arguments.get("safe_serialization", True) is False:
        # Transformers writes no pickles any more; its text encoder is saved apart, as it once was.
        pair.theirs.unet.save_pretrained(tmp_path / "unet", **arguments)
        pair.theirs.vae.save_pretrained(tmp_path / "vae", **arguments)
        pair.theirs.controlnet.save_pretrained(tmp_path / "controlnet", **arguments)
        pair.theirs.scheduler.save_pretrained(tmp_path / "scheduler")
        pair.theirs.text_encoder.config.save_pretrained(tmp_path / "text_encoder")
        state = pair.theirs.text_encoder.state_dict()
        torch.save(state, tmp_path / "text_encoder" / "pytorch_model.bin")
    else:
        pair.theirs.save_pretrained(tmp_path, **arguments)
    assert (tmp_path / "unet" / file).is_file()
    sd = StableDiffusion.load(tmp_path)
    assert_same(sd, pair.sd, but=unused(pair.sd))
    assert sd.config.unet == pair.sd.config.unet and sd.config.schedule == pair.sd.config.schedule
    assert sd.config.text == pair.sd.config.text and sd.config.vae == pair.sd.config.vae
    # The pipeline's folder holds the ControlNet, too.
    assert_same(ControlNet.load(tmp_path, sd.unet), pair.control)


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
@pytest.mark.parametrize(
    "safe, name", [(True, "vae"), (False, "vae/diffusion_pytorch_model.bin")], ids=["folder", "file"]
)
def test_an_autoencoder_alone_that_diffusers_saves(pair, tmp_path, safe, name):
    torch.manual_seed(3)
    theirs = diffusers.AutoencoderKL.from_config(pair.theirs.vae.config).eval()
    theirs.save_pretrained(tmp_path / "vae", safe_serialization=safe)
    latents = torch.randn(1, 4, 4, 4)
    sd = StableDiffusion.load(pair.folder, vae=tmp_path / name)
    with torch.no_grad():
        assert relative(sd.decode(latents), theirs.decode(latents / sd.config.vae.scale).sample) < 2e-5
    assert_same(sd.unet, pair.sd.unet)


def test_there_and_back_is_bit_identical(pair, tmp_path):
    """Original layout -> ours -> diffusers -> ours -> original layout."""
    sd = StableDiffusion.load(pair.folder)
    sd.save(tmp_path / "base.safetensors")
    original, again = open_checkpoint(pair.file), open_checkpoint(tmp_path / "base.safetensors")
    for key in again.keys:
        if not re.search(r"resblocks\.2\.|text_projection|logit_scale", key):
            assert torch.equal(again.tensors[key].view(), original.tensors[key].view())
    assert again.keys <= original.keys


def test_the_small_family_is_described_too(tmp_path):
    """Other depths, other groups, levels without attention, a short vocabulary, v at zero terminal SNR."""
    sd = small_sd()
    control = small_control(sd)
    sd.save(tmp_path / "base", layout="diffusers")
    control.save(tmp_path / "control", layout="diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "control")
    x, t, context, hint = network_inputs(sd)
    with torch.no_grad():
        down, middle = theirs(x, t, context, hint, return_dict=False)
        output = pipeline.unet(
            x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        assert relative(sd.unet(x, t, context, control(x, t, context, hint)), output) < 2e-5
        ids = pipeline.tokenizer(PROMPTS[:1], padding="max_length", return_tensors="pt").input_ids
        assert torch.equal(ids, sd.tokenizer(PROMPTS[:1]))
    assert relative(sd.schedule.alphas_cumprod, pipeline.scheduler.alphas_cumprod) < 1e-5


# ------------------------------------------------------------------------------------------------------------- LoRAs

LORA_MODULES = {  # of both miniatures: where kohya's name has a block, and ours
    "lora_unet_down_blocks_0_attentions_0_": (
        "encoder.blocks.1.transformer.",
        {"transformer_blocks_0_attn1_to_q": "block.self_attention.q", "proj_out": "proj_out"},
    ),
    "lora_unet_up_blocks_1_attentions_2_": (
        "decoder.blocks.5.transformer.",
        {
            "transformer_blocks_0_attn2_to_k": "block.cross_attention.k",
            "transformer_blocks_0_ff_net_0_proj": "block.feed_forward.expand",
        },
    ),
    "lora_unet_": (
        "",
        {
            "mid_block_resnets_1_conv2": "encoder.middle.res2.conv2",
            "up_blocks_0_upsamplers_0_conv": "decoder.blocks.2.upsample.conv",
            "down_blocks_1_resnets_0_time_emb_proj": "encoder.blocks.4.res.time",
        },
    ),
    # Of kohya's text encoders diffusers 0.42.1 loses the attention where transformers 5 is installed.
    "lora_te_text_model_encoder_layers_": ("blocks.", {"0_mlp_fc1": "0.mlp.expand", "1_mlp_fc2": "1.mlp.contract"}),
}


def random_lora(sd, path, rank=4):
    """In kohya's spelling, with one alpha for all: diffusers 0.42.1 loses some of alphas that differ."""
    tensors = {}
    names = {a + c: b + d for a, (b, rows) in LORA_MODULES.items() for c, d in rows.items()}
    for i, (name, ours) in enumerate(names.items()):
        network = sd.text_encoder if name.startswith("lora_te") else sd.unet
        o, inputs, *kernel = network.get_submodule(ours).weight.shape
        tensors[f"{name}.lora_down.weight"] = 0.3 * noise(rank, inputs, *kernel, seed=2 * i)
        tensors[f"{name}.lora_up.weight"] = 0.3 * noise(o, rank, *[1] * len(kernel), seed=2 * i + 1)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def with_lora(sd, file, strength):
    changed = deepcopy(sd)
    merge_loras(read_loras([f"{file}:{strength}"], changed.unet, changed.text_encoder))
    return changed


@torch.no_grad()
def test_a_lora_is_what_diffusers_makes_of_it_and_what_it_saves_is_the_same(pair, tmp_path):
    peft = pytest.importorskip("peft", reason=REASON)
    file, theirs = random_lora(pair.sd, tmp_path / "lora.safetensors"), pair.theirs
    ours = with_lora(pair.sd, file, 0.7)
    theirs.load_lora_weights(file, adapter_name="lora")
    theirs.set_adapters("lora", 0.7)
    parts = {}
    for name in ("unet", "text_encoder"):
        network = getattr(theirs, name)
        parts[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network, adapter_name="lora")
        parts[f"{name}_lora_adapter_metadata"] = network.peft_config["lora"].to_dict()
    theirs.save_lora_weights(tmp_path, **parts)
    again = with_lora(pair.sd, tmp_path / "pytorch_lora_weights.safetensors", 0.7)

    x, t, context, _ = network_inputs(pair.sd)
    ids = pair.sd.tokenizer(PROMPTS)
    outputs = theirs.unet(x, t, context).sample, theirs.text_encoder(ids)[0]
    theirs.unload_lora_weights()
    for sd in (ours, again):
        assert relative(sd.unet(x, t, context), outputs[0]) < 2e-5
        assert relative(sd.text_encoder(ids), outputs[1]) < 2e-5
    assert relative(pair.sd.unet(x, t, context), outputs[0]) > 1e-3  # it had an effect
    assert relative(pair.sd.text_encoder(ids), outputs[1]) > 1e-3


# --------------------------------------------------------------------------------------------------- inpainting bases


@torch.no_grad()
@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_an_inpainting_base_makes_the_latents_of_diffusers_pipelines(pair, tmp_path, monkeypatch):
    """From the base in their layout, and with a ControlNet for another one. The mask is of all grays."""
    given = for_inpainting(pair.sd)
    given.vae.quant_conv.weight[4:], given.vae.quant_conv.bias[4:] = 0, -30  # both sample this posterior
    given.save(tmp_path, layout="diffusers")
    sd = StableDiffusion.load(tmp_path)
    pixels = (255 * torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(1))).byte().numpy()
    image, hint, mask = *map(Image.fromarray, pixels[:2]), Image.fromarray(pixels[2, :, :, 0])
    x, found = noise(1, 4, 8, 8, seed=7), []  # what `generate` draws first
    monkeypatch.setattr(generate_module, "decode", lambda sd, latents, tiled: found.append(latents) or [image])

    def expected(module, name, **inputs):
        networks = {"controlnet": pair.theirs.controlnet} if "control_image" in inputs else {}
        pipeline = getattr(module, name).from_pretrained(tmp_path, **networks)
        pipeline.set_progress_bar_config(disable=True)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: x.clone())
        inputs |= dict(image=image, mask_image=mask, num_inference_steps=4, guidance_scale=4.0)
        return pipeline("a red circle", height=64, width=64, output_type="latent", **inputs).images

    plain = expected(pipeline_stable_diffusion_inpaint, "StableDiffusionInpaintPipeline")
    controlled = expected(
        pipeline_controlnet_inpaint,
        "StableDiffusionControlNetInpaintPipeline",
        control_image=hint,
        controlnet_conditioning_scale=0.8,
        strength=0.5,
    )
    control = Control.from_image(ControlNet.load(pair.control_file, sd), hint, scale=0.8)
    for controls, strength, theirs in (((), 1.0, plain), ([control], 0.5, controlled)):
        options = dict(init=Init(image, strength, mask), steps=4, cfg=4.0, seed=7, size=(64, 64))
        generate_module.generate(sd, "a red circle", controls, **options)
        assert relative(found.pop(), theirs) < 5e-5


# -------------------------------------------------------------------------------------------------------- embeddings


@torch.no_grad()
def test_an_embedding_is_what_diffusers_makes_of_it(pair, tmp_path):
    """Of several vectors, in the middle of a prompt. Diffusers takes only names that no token is part of."""
    vectors = 0.02 * noise(3, pair.sd.config.text.width)
    torch.save({"string_to_param": {"*": vectors}, "name": "x"}, tmp_path / "qzcalm.pt")
    theirs = deepcopy(pair.theirs.text_encoder)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pair.folder, text_encoder=theirs)
    pipeline.load_textual_inversion(tmp_path / "qzcalm.pt", token="qzcalm")
    sd = with_embeddings(pair.sd, {"qzcalm": read_embedding(tmp_path / "qzcalm.pt", vectors.shape[1])})
    prompts = ["a red qzcalm circle", "qzcalm"]
    expected = [pipeline.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts]
    assert relative(encode_prompts(sd, prompts), torch.cat(expected)) < 2e-5
    assert relative(pair.sd.encode_text(prompts), torch.cat(expected)) > 1e-3
