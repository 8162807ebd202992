"""The autoencoder against the published code's numbers."""

import pytest
import torch
import torch.nn.functional as F
from minis import mini_vae, relative, stored
from torch import nn

from controlnet.training.simulation import StorageCounter
from ldm.vae import AutoencoderKL, Posterior

TOLERANCE = 2e-5
SCALE = 0.18215


@torch.no_grad()
def test_the_posterior_is_the_published_one():
    g = stored("vae")
    posterior = mini_vae().posterior(g["image"])
    assert relative(posterior.mean, g["mean"]) < TOLERANCE
    assert relative(posterior.logvar, g["logvar"]) < TOLERANCE
    assert relative(posterior.kl(), g["kl"]) < TOLERANCE


@torch.no_grad()
def test_sides_need_not_be_powers_of_two():
    g = stored("vae")
    posterior = mini_vae().posterior(g["image_72x40"])
    assert posterior.mean.shape == (1, 4, 9, 5)
    assert relative(posterior.mean, g["mean_72x40"]) < TOLERANCE
    assert relative(posterior.logvar, g["logvar_72x40"]) < TOLERANCE


@torch.no_grad()
def test_a_latent_is_a_scaled_sample_and_without_noise_the_scaled_mean():
    g, vae = stored("vae"), mini_vae()
    assert relative(vae.encode(g["image"], g["noise"]), g["latent_sample_scaled"]) < TOLERANCE
    assert relative(vae.encode(g["image"]), SCALE * g["mean"]) < TOLERANCE


@torch.no_grad()
def test_decoding_is_the_published_one_and_clips_nothing():
    g = stored("vae")
    images = mini_vae().decode(g["decode_in_scaled"])
    assert relative(images, g["decode_out"]) < TOLERANCE
    assert images.abs().max() > 1.5


def test_the_logarithm_of_the_variance_is_clamped():
    """At -30 and 20. The stored numbers stand for what the last convolution gives, so there is nothing before."""
    g = stored("vae")
    vae = AutoencoderKL(mini_vae().config)
    vae.encoder = vae.quant_conv = nn.Identity()
    posterior = vae.posterior(g["gauss_params"])
    assert torch.equal(posterior.mean, g["gauss_mean"])
    assert torch.equal(posterior.logvar, g["gauss_logvar"])
    assert g["gauss_params"].max() > 20 and posterior.logvar.max() == 20
    assert torch.equal(vae.posterior(torch.full((1, 8, 2, 2), -50.0)).logvar, torch.full((1, 4, 2, 2), -30.0))
    around_zero = Posterior(torch.zeros_like(posterior.mean), posterior.logvar)
    torch.testing.assert_close(around_zero.sample(torch.ones(1)), g["gauss_std"])


# The blocks one by one on inputs of size 0.01, where a norm's epsilon counts: in a whole pass it is lost in rounding.
PROBES = {
    "first_stage_model.encoder.down.0.downsample": "encoder.levels.0.resample",
    "first_stage_model.encoder.down.1.block.0": "encoder.levels.1.blocks.0",
    "first_stage_model.encoder.mid.attn_1": "encoder.middle.attention",
    "first_stage_model.encoder.norm_out": "encoder.norm_out",
    "first_stage_model.decoder.mid.block_1": "decoder.middle.res1",
    "first_stage_model.decoder.up.3.upsample": "decoder.levels.3.resample",
    "first_stage_model.decoder.norm_out": "decoder.norm_out",
}


@torch.no_grad()
@pytest.mark.parametrize("theirs", PROBES)
def test_a_block_alone_is_the_published_one(theirs):
    g = stored("probes")
    block = mini_vae().get_submodule(PROBES[theirs])
    assert relative(block(g[f"{theirs}/in"]), g[f"vae/{theirs}/out"]) < 1e-5


@torch.no_grad()
def test_three_maps_are_held_at_once():
    """Of a layer's input, the activated input and the output, the largest are of full resolution; the decoder's first
    block there has twice the channels. What is more shows that something outlives its use."""
    vae = mini_vae()
    images = torch.rand(1, 3, 64, 64)
    with StorageCounter() as counter:
        latents = vae.encode(images)
    full = vae.config.channels * 64 * 64 * 4  # bytes of a map of the first level
    assert 3 * full <= counter.most < 3.3 * full
    with StorageCounter() as counter:
        vae.decode(latents)
    wide = vae.config.multipliers[1] / vae.config.multipliers[0]
    assert counter.most < (2 * wide + 1.3) * full


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_gets_what_fused_kernels_take(memory_format, monkeypatch):
    """They need stride 1 in the last dimension of q, k and v; without them a large image's logits fill the memory."""
    strides, attention = [], F.scaled_dot_product_attention

    def spy(*qkv):
        strides.extend(tensor.stride(-1) for tensor in qkv)
        return attention(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    vae, image = mini_vae(), stored("vae")["image"].contiguous(memory_format=memory_format)
    vae.decode(vae.encode(image).contiguous(memory_format=memory_format))
    assert strides == [1] * 6
