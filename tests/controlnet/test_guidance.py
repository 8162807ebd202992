"""Guidance with controls: the published numbers of its variants, and what each option does to the output."""

from functools import cache

import pytest
import torch
from minis import MINIS, corner, inputs, mini_control, mini_unet, relative, stored
from small import SMALL, small_control, small_sd

from controlnet.guidance import (
    Control,
    acting_timesteps,
    guess_weights,
    guided,
    literal_resolution_weights,
    middle_weights,
    residual_levels,
    resolution_weights,
)
from ldm.config import SD15, SD21, TINY
from ldm.samplers import ddim_timesteps, sample, sample_loop
from ldm.schedule import Schedule

TOLERANCE = 2e-5
LEVELS = residual_levels(SD15.unet)  # the miniatures' too


def denoiser(style="sd1", cfg=9.0, controls=None, **options):
    _, _, context, hint = inputs(style)
    negative = stored("inputs")[f"{style}/uncond"]
    controls = [Control(mini_control(style), hint)] if controls is None else controls
    return guided(mini_unet(style), context, negative, cfg, controls, **options)


def mini_schedule(style="sd1"):
    return Schedule(MINIS[style].schedule)


# Small networks, for what is compared with their own outputs.
SD = small_sd()
UNET, NET, SMALL_SCHEDULE = SD.unet, small_control(SD), SD.schedule
SMALL_LEVELS = residual_levels(SMALL.unet)
CONTEXT, NEGATIVE = torch.randn(2, 2, 77, SMALL.unet.context_width, generator=torch.Generator().manual_seed(0))


def small_inputs():
    """x (2, 4, 8, 8), t (2,), context (2, 77, D) and hint (2, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(1)
    x, hint = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, 3, 64, 64, generator=generator)
    return x, torch.tensor([601, 21]), CONTEXT, hint


def small_denoiser(cfg=9.0, controls=(), **options):
    return guided(UNET, CONTEXT, NEGATIVE, cfg, controls, **options)


# ------------------------------------------------------------------------------------------------------------ numbers


VARIANTS = {
    "eps_control_strength0.5": {"scale": 0.5},
    "eps_control_guess_scales": {"layers": guess_weights(LEVELS)},
    "eps_only_mid_control": {"layers": middle_weights(LEVELS)},
}


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_output_of_each_variant_is_the_published_one(style, name):
    x, t, _, hint = inputs(style)
    control = Control(mini_control(style), hint, **VARIANTS[name])
    assert relative(denoiser(style, 1, [control])(x, t), stored("control")[f"{style}/{name}"]) < TOLERANCE


@torch.no_grad()
def test_a_sample_in_guess_mode_is_the_published_one():
    schedule = mini_schedule("sd2")
    control = Control(mini_control("sd2"), inputs("sd2")[3], layers=guess_weights(LEVELS), prompt_only=True)
    x = sample("ddim", denoiser("sd2", 9, [control]), stored("inputs")["x"], schedule, 10)
    assert relative(x, stored("sampling_variants")["sd2/ddim_cfg9_guess"]) < 5e-5


@torch.no_grad()
def test_image_to_image_is_the_published_one():
    """From index 5 of ten timesteps, six steps down."""
    g, schedule = stored("sampling_variants"), mini_schedule()
    timesteps = ddim_timesteps(schedule, 10)[4:]
    x = schedule.q_sample(g["sd1/z0"], torch.tensor(timesteps[:1] * 2), g["sd1/noise"])
    assert relative(x, g["sd1/img2img_noised"]) < 1e-6
    x = sample_loop("ddim", denoiser(), x, timesteps, schedule)
    assert relative(x, g["sd1/img2img_out"]) < 5e-5


@torch.no_grad()
def test_inpainting_is_the_published_one():
    g, schedule, found = stored("sampling_variants"), mini_schedule(), []
    noises = iter(g["sd1/mask_noises"])

    def keep(x, t):
        return g["sd1/mask"] * schedule.q_sample(g["sd1/z0"], t, next(noises)) + (1 - g["sd1/mask"]) * x

    on_step = lambda i, x, x0: found.append(x)  # noqa: E731
    sample("ddim", denoiser(), stored("inputs")["x"], schedule, 10, before_step=keep, on_step=on_step)
    for step, want in zip((0, -1), g["sd1/masked"], strict=True):
        assert relative(found[step], want) < 5e-5


# ------------------------------------------------------------------------------------------------------------ strengths


def test_the_level_of_each_residual():
    assert LEVELS == residual_levels(SD21.unet) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert residual_levels(TINY.unet) == [0, 0, 1, 1, 2, 2, 2]
    for style, config in MINIS.items():
        x, t, context, hint = corner(style)
        heights = [r.shape[2] for r in mini_control(style)(x, t, context, hint)]
        assert heights == [8 // 2**level for level in residual_levels(config.unet)]


def test_resolution_weights_are_64_over_the_blocks_side_or_an_eighth_of_it():
    sides = [64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8, 8]  # of SD's residuals at 512 pixels
    assert literal_resolution_weights(LEVELS) == [64 / side for side in sides]
    assert resolution_weights(LEVELS) == [64 / side / 8 for side in sides]
    assert resolution_weights(residual_levels(TINY.unet)) == [0.25, 0.25, 0.5, 0.5, 1, 1, 1]


def test_guess_mode_gets_weaker_towards_the_first_block():
    layers = guess_weights(LEVELS)
    assert len(layers) == 13 and layers[12] == 1 and layers[0] == pytest.approx(0.0994140, rel=1e-5)
    assert all(a / b == pytest.approx(0.825) for a, b in zip(layers, layers[1:], strict=False))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3, 6])
def test_each_layer_has_a_strength_of_its_own(layer):
    x, t, context, hint = small_inputs()
    layers = [1.0] * len(SMALL_LEVELS)
    layers[layer] = 0.25
    residuals = NET(x, t, context, hint)
    residuals[layer] = 0.5 * residuals[layer]
    others = [r if i == layer else 2 * r for i, r in enumerate(residuals)]
    got = small_denoiser(cfg=1, controls=[Control(NET, hint, scale=2.0, layers=layers)])(x, t)
    assert relative(got, UNET(x, t, context, others)) < 1e-6


# ------------------------------------------------------------------------------------------------------------ branches


def modes():
    hint = small_inputs()[3]
    return [Control(NET, hint), Control(NET, hint.flip(-1), 0.5, guess_weights(SMALL_LEVELS), prompt_only=True)]


@torch.no_grad()
def test_two_evaluations_give_what_one_batch_gives():
    x, t, *_ = small_inputs()
    for controls in (modes(), modes()[1:], []):
        got = small_denoiser(controls=controls, batched=False)(x, t)
        assert relative(got, small_denoiser(controls=controls)(x, t)) < 5e-6


@torch.no_grad()
@pytest.mark.parametrize("batched", [True, False])
def test_a_control_of_the_prompt_alone_does_not_act_on_the_negative_one(batched):
    x, t, context, hint = small_inputs()
    without = UNET(x, t, NEGATIVE)
    want = without + 3 * (UNET(x, t, context, NET(x, t, context, hint)) - without)
    got = small_denoiser(cfg=3, controls=[Control(NET, hint, prompt_only=True)], batched=batched)(x, t)
    assert relative(got, want) < 5e-6


@torch.no_grad()
def test_without_guidance_the_only_branch_is_the_prompts():
    x, t, _, hint = small_inputs()
    both = [small_denoiser(cfg=1, controls=[Control(NET, hint, prompt_only=p)])(x, t) for p in (True, False)]
    assert torch.equal(*both)


# ------------------------------------------------------------------------------------------------------------ where


@torch.no_grad()
def test_a_mask_is_the_mean_over_each_positions_pixels():
    x, t, context, hint = small_inputs()
    mask = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    residuals = []
    for r in NET(x, t, context, hint):
        side = 64 // r.shape[2]
        residuals.append(r * mask.unfold(2, side, side).unfold(3, side, side).mean((-1, -2)))
    want = UNET(x, t, context, residuals)
    assert relative(small_denoiser(cfg=1, controls=[Control(NET, hint, mask=mask)])(x, t), want) < 1e-6


@torch.no_grad()
def test_a_white_mask_changes_nothing_and_a_black_one_takes_the_control_away():
    x, t, _, hint = small_inputs()
    white = torch.ones(1, 1, 64, 64)
    plain, masked, none = (
        small_denoiser(controls=[Control(NET, hint, mask=mask)])(x, t) for mask in (None, white, 0 * white)
    )
    assert relative(masked, plain) < 1e-6
    assert relative(none, small_denoiser(controls=[])(x, t)) < 1e-6


@torch.no_grad()
def test_complementary_masks_add_up():
    x, t, _, hint = small_inputs()
    left = torch.zeros(1, 1, 64, 64)
    left[..., :28] = 1
    parts = [Control(NET, hint, mask=mask) for mask in (left, 1 - left)]
    whole = [Control(NET, hint)]
    assert relative(small_denoiser(controls=parts)(x, t), small_denoiser(controls=whole)(x, t)) < 5e-6


# ------------------------------------------------------------------------------------------------------------ when


@torch.no_grad()
def test_a_control_acts_in_its_part_of_the_steps():
    x, _, _, hint = small_inputs()
    timesteps = ddim_timesteps(SMALL_SCHEDULE, 10)
    ts = [torch.full((2,), timestep) for timestep in timesteps]

    @cache
    def want(i, acts):
        return small_denoiser(cfg=1, controls=[Control(NET, hint)] * acts)(x, ts[i])

    for start, end, acting in [(0.0, 0.5, range(5)), (0.5, 1.0, range(5, 10)), (0.3, 0.7, range(3, 7))]:
        got = small_denoiser(cfg=1, controls=[Control(NET, hint, start=start, end=end)], timesteps=timesteps)
        for i in {acting[0] - 1, acting[0], acting[-1], acting[-1] + 1} & set(range(10)):
            assert relative(got(x, ts[i]), want(i, i in acting)) < 1e-6, (start, end, i)


def test_a_part_of_the_steps_has_no_gaps_between_its_timesteps():
    """Where Heun's method and DPM++ SDE evaluate the UNet, too."""
    first, beyond = acting_timesteps([900, 700.5, 500, 300], 0.25, 0.75)
    assert (first, beyond) == (700.5, 300) and acting_timesteps([900, 700], 0.5, 1) == (700, -1)
    assert acting_timesteps([900, 700], 0.1, 0.2) == (-1, -1)


def test_a_part_of_the_steps_needs_the_timesteps():
    hint = small_inputs()[3]
    with pytest.raises(ValueError, match="pass the argument timesteps"):
        small_denoiser(controls=[Control(NET, hint, end=0.5)])


def test_hints_are_not_repeated_for_a_larger_batch():
    x, t, _, hint = small_inputs()
    denoise = small_denoiser(controls=[Control(NET, hint, mask=torch.ones(2, 1, 64, 64))])
    with pytest.raises(ValueError, match="there are 2 hints of a control for a batch of 4, expected 1 or 4"):
        denoise(x.repeat(2, 1, 1, 1), t.repeat(2))
    assert denoise(x, t).shape == x.shape


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 0.5, "end": 0.5}, "acts from 0.5 to 0.5 of the steps, expected 0 <= start < end <= 1"),
        ({"start": -0.1}, "acts from -0.1 to 1.0"),
        ({"end": 1.5}, "acts from 0.0 to 1.5"),
        ({"layers": [1.0] * 6}, "6 layer weights, expected 7"),
        ({"hint": torch.zeros(3, 64, 64)}, r"has the shape \(3, 64, 64\), expected \(1, 3, H, W\)"),
        ({"hint": torch.zeros(1, 1, 64, 64)}, r"has the shape \(1, 1, 64, 64\), expected"),
    ],
)
def test_a_control_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Control(**{"net": NET, "hint": small_inputs()[3], **options})
