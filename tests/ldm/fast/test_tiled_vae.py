"""The tiled VAE gives the same numbers, whatever the tiles, and holds less memory at once."""

import pytest
import torch
from minis import mini_vae, relative, stored

from controlnet.training.simulation import StorageCounter
from ldm.fast import tiled_vae
from ldm.fast.tiled_vae import decode_tiled, pointwise_norm_silu, posterior_tiled

TOLERANCE = 2e-6  # of the relative error; one step of 8 bits is 4e-3 of an image's range


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 17, 1000])
def test_tiled_decoding_is_decoding(rows, monkeypatch):
    monkeypatch.setattr(tiled_vae, "ROWS", rows)
    latents = stored("vae")["decode_in_scaled"]
    whole, tiles = mini_vae().decode(latents), decode_tiled(mini_vae(), latents)
    assert relative(tiles, whole) < TOLERANCE
    # No seam: the difference is as small at every row.
    rows_off = (tiles - whole).abs().amax(dim=(0, 1, 3))
    assert rows_off.max() < 2e-5 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("rows, image", [(1, "image_72x40"), (6, "image"), (17, "image_72x40"), (1000, "image")])
def test_the_tiled_posterior_is_the_posterior(rows, image, monkeypatch):
    monkeypatch.setattr(tiled_vae, "ROWS", rows)
    images = stored("vae")[image]
    whole, tiles = mini_vae().posterior(images), posterior_tiled(mini_vae(), images)
    assert relative(tiles.mean, whole.mean) < TOLERANCE and relative(tiles.logvar, whole.logvar) < TOLERANCE


@torch.no_grad()
def test_images_whose_sides_are_no_multiple_of_8_are_cut_off_as_in_the_whole(monkeypatch):
    monkeypatch.setattr(tiled_vae, "ROWS", 8)
    images = stored("vae")["image"][:, :, :61, :45]
    assert relative(posterior_tiled(mini_vae(), images).mean, mini_vae().posterior(images).mean) < TOLERANCE


@torch.no_grad()
def test_tiles_of_an_image_are_not_images_of_tiles():
    """Halves that are decoded independently differ visibly: their norms and attention see only a part."""
    latents = stored("vae")["decode_in_scaled"]
    apart = torch.cat([mini_vae().decode(half) for half in latents.chunk(2, dim=2)], dim=2)
    assert relative(apart, mini_vae().decode(latents)) > 1000 * TOLERANCE


@torch.no_grad()
def test_no_layer_is_computed_from_more_than_a_tile(monkeypatch):
    heights, plain = [], torch.nn.functional.conv2d

    def conv2d(x, *args, **options):
        if x.shape[3] > 10:  # than the latents with their padding
            heights.append(x.shape[2])
        return plain(x, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    monkeypatch.setattr(tiled_vae, "ROWS", 16)
    latents = torch.randn(1, 4, 32, 8, generator=torch.Generator().manual_seed(0))
    assert decode_tiled(mini_vae(), latents).shape == (1, 3, 256, 64)
    assert max(heights) == 18


@torch.no_grad()
def test_two_maps_are_held_at_once(monkeypatch):
    """A layer's input and its output; beside them no more than tiles of two rows."""
    monkeypatch.setattr(tiled_vae, "ROWS", 2)
    vae = mini_vae()
    images = torch.rand(1, 3, 96, 96)
    full = vae.config.channels * 96 * 96 * 4  # bytes of a map of the first level
    with StorageCounter() as counter:
        latents = posterior_tiled(vae, images).mean
    assert 2 * full <= counter.most < 2.5 * full
    with StorageCounter() as counter:
        decode_tiled(vae, latents)
    wide = vae.config.multipliers[1] / vae.config.multipliers[0]
    assert counter.most < (wide + 1.5) * full


@torch.no_grad()
def test_halves_are_normalised_in_fp32():
    """Their squares leave the range of fp16: tiles near its end come out finite."""
    norm = torch.nn.GroupNorm(2, 4).half()
    x = (300 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000).half()
    want = torch.nn.functional.silu(norm.float()(x.float()))
    assert (pointwise_norm_silu(norm.half(), x)(x).float() - want).abs().max() < 5e-3
