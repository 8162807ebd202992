"""Tiles: what they add up to, the seams that they do not leave, and the memory that they take. And the second pass."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import SMALLEST, small_control, small_sd
from test_generate import arrays, differ, hint
from torch._subclasses.fake_tensor import FakeTensorMode

from controlnet.common.images import resized
from controlnet.guidance import Control, exact
from controlnet.hints.hint_image import HintImage
from controlnet.inference import memory
from controlnet.inference.generate import generate, make_denoise
from controlnet.inference.image_to_image import Init
from controlnet.inference.tiles import in_tiles, shares_of, spans, tiles_of
from controlnet.inference.upscale import larger_size, upscaled
from controlnet.model import ControlNet
from controlnet.training.simulation import StorageCounter, make_fake
from ldm.checkpoints.load import without_weights
from ldm.config import SD15, TINY
from ldm.stable_diffusion import StableDiffusion

CPU = torch.device("cpu")
LARGE = tiles_of(TINY, (512, 512))
SIZE = (160, 96)  # of SMALLEST, whose tiles are 64 x 64 pixels, 8 x 8 latents


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


@pytest.fixture(scope="module")
def net(sd):
    return small_control(sd)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", [8, 16, 64])
def test_spans_cover_every_length_and_overlap_by_a_quarter(side):
    for length in range(side, 5 * side):
        found = spans(length, side)
        assert found[0].start == 0 and found[-1].stop == length
        assert all(span.stop - span.start == side for span in found)
        assert all(a.stop - b.start >= side // 4 and a.start < b.start for a, b in zip(found, found[1:], strict=False))
    assert spans(side - 1, side) == [slice(0, side - 1)]


def test_an_image_of_the_bases_resolution_is_one_piece():
    assert tiles_of(SD15, (512, 512)) == [] and len(tiles_of(SD15, (512, 576))) == 2
    assert len(tiles_of(SD15, (2048, 2048))) == 25


def test_shares_add_up_to_one_and_are_small_at_edges_within():
    tiles = tiles_of(SMALLEST, SIZE)
    total = torch.zeros(20, 12)
    for tile, share in zip(tiles, shares_of(tiles), strict=True):
        tile.of(total).add_(share)
        for rows in (tile.rows,):  # the image's own edges excepted
            assert rows.start == 0 or share[0].max() < 0.3
    torch.testing.assert_close(total, torch.ones(20, 12))


def local(weight):
    """A network that looks at its neighbours, padded with zeros as the UNet is."""
    return lambda x: F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def test_what_no_edge_disturbs_is_the_whole_to_rounding():
    x, t = randn(2, 4, 20, 12), torch.zeros(2)
    tiles, pointwise = tiles_of(SMALLEST, SIZE), local(randn(4, 4, 1, 1, seed=1))
    y = in_tiles(tiles, [lambda x, t, timestep: pointwise(x)] * len(tiles), CPU)(x, t, 0)
    torch.testing.assert_close(y, pointwise(x), rtol=1e-5, atol=1e-5)


def test_edges_of_tiles_leave_no_seams():
    """Each tile is wrong at its edges, by the zeros beyond them: what is seen of that is a third of a plain mean's."""
    x, t = torch.ones(1, 1, 44, 44), torch.zeros(1)
    tiles, network = tiles_of(replace(SMALLEST, resolution=128), (352, 352)), local(torch.full((1, 1, 3, 3), 1 / 9))
    y = in_tiles(tiles, [lambda x, t, timestep: network(x)] * len(tiles), CPU)(x, t, 0)
    plain, count = torch.zeros_like(x), torch.zeros_like(x)
    for tile in tiles:
        tile.of(plain).add_(network(tile.of(x)))
        tile.of(count).add_(1)
    steps = [(y - network(x)).diff(dim=-1).abs().max().item() for y in (y, plain / count)]  # from pixel to pixel
    assert 0 < 3 * steps[0] < steps[1]


def test_each_tile_has_the_part_of_hint_and_mask_that_lies_there(sd, net, monkeypatch):
    seen, tiles = [], tiles_of(SMALLEST, SIZE)
    monkeypatch.setattr("controlnet.inference.generate.guided", lambda *given: seen.append(given[4]) or (lambda *_: 0))
    control = Control(net, hint(size=SIZE), mask=hint(1, SIZE)[:, :1])
    make_denoise(sd, randn(1, 77, 16), randn(1, 77, 16), 2.0, [control], [999], True, exact, tiles=tiles)
    assert len(seen) == len(tiles) == 6
    for (cut,), (rows, columns) in zip(seen, tiles, strict=True):
        part = (..., slice(8 * rows.start, 8 * rows.stop), slice(8 * columns.start, 8 * columns.stop))
        assert torch.equal(cut.hint, control.hint[part]) and torch.equal(cut.mask, control.mask[part])


def test_tiles_make_another_image_of_large_sizes_alone(sd, net):
    for size, other in (((96, 64), True), ((64, 64), False)):
        controls = [Control(net, hint(size=size))]
        tiled, whole = (arrays(sd, controls=controls, steps=1, tile_diffusion=tiles) for tiles in (True, False))
        assert tiled.shape == (1, *size, 3) and differ(tiled, whole) == other


def test_memory_is_bounded_by_the_tile():
    """Counted: an image of twice the area takes as much, beside its own latents and its hints' features."""
    with without_weights():
        sd = StableDiffusion(SMALLEST).requires_grad_(False)
        net = ControlNet.from_unet(sd.unet).requires_grad_(False)
    most = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        make_fake(sd), make_fake(net)
        context = torch.zeros(1, 77, SMALLEST.unet.context_width)
        for side in (64, 128):
            control = Control(net, torch.zeros(1, 3, 64, side))
            tiles = tiles_of(SMALLEST, (64, side))
            denoise = make_denoise(sd, context, context, 2.0, [control], [999], True, exact, tiles=tiles)
            x = torch.zeros(1, 4, 8, side // 8)
            with StorageCounter() as counter:
                denoise(x, torch.zeros(1, dtype=torch.int64), 0)
            most[side] = counter.most - 4 * x.numel()
    assert most[128] <= 1.05 * most[64]


def test_the_rule_for_tiles():
    plan = partial(memory.Plan, TINY, dtype=torch.float32)
    assert plan((512, 512), controls=0, tile_diffusion=True).guided() == plan((128, 128), controls=0).guided()
    features = 4 * TINY.unet.channels * 64 * 64
    tile, tiled, whole = (
        plan((128, 128), controls=3),
        plan((512, 512), controls=3, tile_diffusion=True),
        plan((512, 512), controls=3),
    )
    assert tiled.guided() == tile.guided() + 2 * 3 * features < whole.guided() / 6
    kept = sum((tile.rows.stop - tile.rows.start) * (tile.columns.stop - tile.columns.start) for tile in LARGE)
    assert 64 * 64 < kept < 2 * 64 * 64
    assert tiled.memory(CPU) < whole.memory(CPU)


# -------------------------------------------------------------------------------------------------- the second pass


def test_the_second_pass_is_image_to_image_of_the_enlarged_image(sd, net):
    control = Control(net, HintImage(resized(generate(sd, "a", steps=1)[0], (64, 64))))
    settings = dict(steps=2, cfg=2.0)
    images = generate(sd, "a", [control], seed=5, count=2, size=(32, 64), **settings)
    large = upscaled(sd, images, 1.4, "a", [control], strength=0.5, seed=5, **settings)
    assert [image.size for image in large] == [(96, 48)] * 2  # the nearest that the base can make
    init = Init(resized(images[1], (48, 96)), 0.5)
    (want,) = generate(sd, "a", [control], seed=6, size=(48, 96), init=init, **settings)
    assert np.array_equal(np.asarray(large[1]), np.asarray(want))


def test_hints_that_are_tensors_are_enlarged(sd, net):
    hints = torch.cat([hint(size=(64, 64)), 1 - hint(size=(64, 64))])  # one for each image
    images = generate(sd, "a", [Control(net, hints)], steps=2, count=2)
    large = upscaled(sd, images, 2, "a", [Control(net, hints)], steps=2)
    (second,) = upscaled(sd, images[1:], 2, "a", [Control(net, hints[1:])], seed=1, steps=2)
    assert large[1].size == (128, 128)
    assert np.array_equal(np.asarray(large[1]), np.asarray(second))


@pytest.mark.parametrize("factor", [0.5, 0, -1, float("nan"), float("inf"), 1e9])
def test_a_factor_that_makes_no_larger_image_is_refused(factor):
    with pytest.raises(ValueError, match="times as large, expected 1"):
        larger_size(SMALLEST, (64, 64), factor)


def test_a_size_beyond_what_can_be_made_is_refused():
    with pytest.raises(ValueError, match="expected multiples of 16 up to 8192"):
        larger_size(SMALLEST, (64, 64), 200)
