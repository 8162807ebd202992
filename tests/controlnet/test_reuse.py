"""Sampling with features of earlier steps: what is computed when, what it gives, and that nothing leaks."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from minis import relative
from PIL import Image
from small import SMALLEST, small_control, small_sd

from controlnet.guidance import Control, PreparedControl, guided
from controlnet.inference.generate import generate
from controlnet.inference.image_to_image import Init
from controlnet.reuse import Reusing, reusing
from ldm.samplers import timesteps_for

TIMESTEPS = [901, 701, 501, 301, 101]
SD = small_sd(SMALLEST)
UNET, NET = SD.unet, small_control(SD)
GENERATOR = torch.Generator().manual_seed(0)
HINT = torch.rand(2, 3, 64, 64, generator=GENERATOR)
CONTEXT, NEGATIVE = torch.randn(2, 2, 77, SMALLEST.unet.context_width, generator=GENERATOR)


def control(**options):
    return Control(NET, HINT, **options)


def denoiser(controls, reuse, cfg=3, **options):
    make_predictor = None if reuse == 1 else reusing(reuse)
    return guided(UNET, CONTEXT, NEGATIVE, cfg, controls, TIMESTEPS, make_predictor=make_predictor, **options)


def way(seed=0):
    """x and t of a sampling, each x another one."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 4, 8, 8, generator=generator), torch.full((2,), t)) for t in TIMESTEPS]


@contextmanager
def recorded(module):
    """The inputs of each call."""
    calls = []
    handle = module.register_forward_hook(lambda module, arguments, output: calls.append(arguments))
    yield calls
    handle.remove()


# ------------------------------------------------------------------------------------------------------------ a branch


@torch.no_grad()
@pytest.mark.parametrize("controlled", [True, False])
def test_a_key_step_is_exact_to_the_bit(controlled):
    predict, controls = Reusing(UNET, every=2), [PreparedControl(control())] if controlled else []
    for i, (x, t) in enumerate(way()):
        residuals = NET(x, t, CONTEXT, HINT) if controlled else None
        got, want = predict(x, t, int(t[0]), CONTEXT, controls, "prompt"), UNET(x, t, CONTEXT, residuals)
        assert torch.equal(got, want) == (i % 2 == 0)


@torch.no_grad()
def test_between_key_steps_the_line_through_the_last_two_is_followed_half_the_way():
    """What enters the last block of the decoder: deep features beside the first skip."""
    steps, predict, last = way(), Reusing(UNET, every=2), UNET.decoder.blocks[-1]
    controls = [PreparedControl(control())]
    residuals = [NET(x, t, CONTEXT, HINT) for x, t in steps]
    with recorded(last) as exact:
        for (x, t), added in zip(steps, residuals, strict=True):
            UNET(x, t, CONTEXT, added)
    with recorded(last) as got:
        for x, t in steps:
            predict(x, t, int(t[0]), CONTEXT, controls, "prompt")
    width = UNET.encoder.skip_widths[0]
    deep = [arguments[0][:, :-width] for arguments in exact]
    for i, wanted_deep, wanted_residual in [
        (1, deep[0], residuals[0][0]),  # only one key step before it
        (3, 1.25 * deep[2] - 0.25 * deep[0], 1.25 * residuals[2][0] - 0.25 * residuals[0][0]),
    ]:
        features, time, _ = got[i]
        skip = UNET.encoder.blocks[0](steps[i][0], time, CONTEXT) + wanted_residual
        assert relative(features, torch.cat([wanted_deep, skip], dim=1)) < 1e-5
        assert torch.equal(time, UNET.encoder.time_embedding(steps[i][1]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reuses_too(dtype):
    half = copy.deepcopy(UNET).to(dtype)
    full, predict = (Reusing(unet, every=2) for unet in (UNET, half))
    for x, t in way():
        output = predict(x.to(dtype), t, int(t[0]), CONTEXT.to(dtype), [], "prompt")
        assert output.dtype == dtype
        assert relative(output.float(), full(x, t, int(t[0]), CONTEXT, [], "prompt")) < 0.06


@pytest.mark.parametrize("every, full", [(2, 7), (3, 5), (4, 4)])
def test_a_sampler_that_looks_twice_at_a_timestep_is_still_at_the_same_image(every, full):
    timesteps = timesteps_for("heun", SD.schedule, 8)
    twice = [timestep for timestep in timesteps for _ in range(2)][1:-1]
    predict = Reusing(UNET, every)
    assert sum(predict.advance(timestep, []) for timestep in twice) == full


# ------------------------------------------------------------------------------------------------------------ guidance


@torch.no_grad()
@pytest.mark.parametrize("reuse, full", [(2, 3), (3, 2)])
def test_only_every_nth_step_computes_the_control_and_the_deep_blocks(reuse, full):
    denoise = denoiser([control()], reuse)
    saved = (UNET.encoder.blocks[1], UNET.decoder.blocks[-2], NET.encoder.blocks[0])
    with recorded(saved[0]) as second, recorded(saved[1]) as last_but_one, recorded(saved[2]) as control_first:
        for x, t in way():
            denoise(x, t)
    assert [len(calls) for calls in (second, last_but_one, control_first)] == [full] * 3


MODES = {
    "two controls": [control(), control(scale=0.5)],
    "no control": [],
    "prompt only": [control(), control(scale=0.5, prompt_only=True)],
    "mask": [control(mask=torch.linspace(0, 1, 64).expand(1, 1, 64, 64))],
    "ranges": [control(start=0.2), control(end=0.6, prompt_only=True)],
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODES)
def test_key_steps_are_exact_in_every_mode_and_two_evaluations_give_what_one_batch_gives(name):
    exact, batched = denoiser(MODES[name], 1), denoiser(MODES[name], 2)
    apart = denoiser(MODES[name], 2, batched=False)
    key_steps = [0, 1, 3] if name == "ranges" else [0, 2, 4]
    for i, (x, t) in enumerate(way()):
        output = batched(x, t)
        assert torch.equal(output, exact(x, t)) == (i in key_steps)
        assert relative(apart(x, t), output) < 1e-5


@torch.no_grad()
def test_without_guidance_there_is_one_branch():
    exact, approximate = (denoiser([control()], reuse, cfg=1) for reuse in (1, 2))
    assert [torch.equal(approximate(x, t), exact(x, t)) for x, t in way()] == [True, False] * 2 + [True]


@torch.no_grad()
def test_features_of_other_controls_are_not_followed():
    """At index 1 of five the control begins: a key step, after which the features of index 0 have no part."""
    late, steps = [control(start=0.2)], way()
    whole, part = denoiser(late, 2), denoiser(late, 2)
    for i, (x, t) in enumerate(steps):
        output = whole(x, t)
        if i >= 1:
            assert torch.equal(part(x, t), output)


@torch.no_grad()
def test_a_second_image_is_as_if_it_were_the_first():
    used, fresh = denoiser([control()], 2), denoiser([control()], 2)
    for x, t in way(seed=1):
        used(x, t)
    for x, t in way():
        assert torch.equal(used(x, t), fresh(x, t))


def test_reuse_needs_a_distance():
    with pytest.raises(ValueError, match="reuse is 0, expected 1"):
        reusing(0)


# ------------------------------------------------------------------------------------------------------------ images


DRAWN = Control(NET, HINT[:1])


def arrays(controls=(), **options):
    """`generate` in five steps, as arrays (count, H, W, 3)."""
    images = generate(SD, "a circle", controls, **{"steps": 5, "sampler": "ddim", **options})
    return np.stack([np.asarray(picture) for picture in images])


def test_an_image_is_exact_unless_asked_otherwise():
    exact = arrays([DRAWN])
    assert np.array_equal(arrays([DRAWN], reuse=1), exact)
    assert not np.array_equal(arrays([DRAWN], reuse=2), exact)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_no_features_pass_from_one_image_or_call_to_the_next(sampler):
    controls = [DRAWN, replace(DRAWN, start=0.3, scale=0.5)]
    images = arrays(controls, sampler=sampler, reuse=2, count=2, seed=3)
    assert np.array_equal(arrays(controls, sampler=sampler, reuse=2, seed=4)[0], images[1])


def test_image_to_image_counts_the_steps_that_are_done():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with recorded(DRAWN.net.encoder.middle) as calls:
        arrays([DRAWN], reuse=2, init=Init(photo, strength=0.6))
    assert len(calls) == 2  # three steps of five


def test_with_little_memory_the_image_is_the_same_to_rounding():
    plain, low = (arrays([DRAWN], reuse=2, cpu_offload=device).astype(int) for device in (None, "cpu"))
    assert np.abs(plain - low).max() <= 1
