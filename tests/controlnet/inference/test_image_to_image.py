"""Image-to-image and inpainting in one call: how much is kept, where, and what low memory and bad numbers do."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALLEST, small_control, small_sd
from test_generate import arrays, differ, hint

from controlnet.common.images import resized, to_images, to_pil
from controlnet.guidance import Control
from controlnet.hints.hint_image import HintImage
from controlnet.inference import offload
from controlnet.inference.generate import generate
from controlnet.inference.image_to_image import Init, steps_done
from controlnet.inference.memory import decoding_memory
from controlnet.inference.offload import decode
from controlnet.inference.sizes import default_size
from ldm.samplers import timesteps_for


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


def photo(size=(64, 64), seed=3):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def left_half(size=(64, 64)):
    """White, so made anew."""
    pixels = np.zeros(size, np.uint8)
    pixels[:, : size[1] // 2] = 255
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------------------ image to image


@pytest.mark.parametrize("strength", [0, 0.3])  # of two steps none
@pytest.mark.parametrize("options", [{}, {"mask": left_half()}, {"mask": left_half(), "only_masked": 4}])
def test_without_steps_the_image_is_kept_to_the_bit(sd, strength, options):
    images = arrays(sd, init=Init(photo(), strength, **options), count=2)
    assert images.shape[0] == 2 and all(np.array_equal(image, np.asarray(photo())) for image in images)


def test_the_start_is_a_sample_of_the_posterior(sd):
    x, posterior_noise = draws(0, 2)
    posterior = sd.vae.posterior(to_images([np.array(photo())]))
    z0, begun = sd.config.vae.scale * posterior.sample(posterior_noise), []
    plain = sd.schedule.q_sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd.schedule, "q_sample", lambda *given: begun.append(given) or plain(*given))
        arrays(sd, init=Init(photo(), strength=0.5))
    torch.testing.assert_close(begun[0][0], z0)
    assert torch.equal(begun[0][2], x)


def draws(seed, count, shape=(1, 4, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_strength_1_is_text_to_image_of_the_images_size(sd):
    assert np.array_equal(arrays(sd, init=Init(photo((32, 96)), 1.0), size=(32, 96)), arrays(sd, size=(32, 96)))


def test_more_strength_keeps_less_of_the_image(sd):
    z0 = sd.encode(to_images([np.array(photo())]), torch.Generator().manual_seed(0))  # a random autoencoder's own
    kept = np.asarray(to_pil(sd.decode(z0)[0])).astype(int)
    made = [arrays(sd, init=Init(photo(), strength), steps=10)[0] for strength in (0.1, 0.5, 0.9)]
    distances = [np.abs(image - kept).mean() for image in made]
    assert distances == sorted(distances) and len(set(distances)) == 3


@pytest.mark.parametrize(
    "sampler, strength, done",
    [("ddim", 0.5, 5), ("ddim", 0.7, 7), ("ddim", 0.29, 2), ("ddim", 0.95, 9), ("ddim", 1.0, 10)]
    + [("ddpm", 0.3, 3), ("dpm++", 0.3, 3), ("heun", 0.3, 3)],
)
def test_the_last_steps_are_done_from_as_much_noise(sd, sampler, strength, done, monkeypatch):
    steps, begun = [], []
    plain = sd.schedule.q_sample
    monkeypatch.setattr(sd.schedule, "q_sample", lambda x0, t, n: begun.append(t.tolist()) or plain(x0, t, n))
    generate(sd, "a", init=Init(photo(), strength), steps=10, sampler=sampler, callback=lambda p: steps.append(p.step))
    assert len(steps) == done
    timesteps = timesteps_for(sampler, sd.schedule, 10)
    assert begun == ([[timesteps[-done]]] if strength < 1 else [])


def test_no_step_is_lost_to_rounding():
    assert [steps_done(i / 100, 100) for i in range(101)] == list(range(101))


def test_the_start_noise_and_the_posteriors_are_one_images_alone(sd):
    images = arrays(sd, init=Init(photo(), 0.6), count=2, seed=4)
    assert np.array_equal(arrays(sd, init=Init(photo(), 0.6), seed=5)[0], images[1])
    assert differ(*images)


def test_the_size_is_fitted_to_the_image(sd):
    assert arrays(sd, init=Init(photo((100, 200)))).shape[1:3] == (64, 128)
    assert arrays(sd, init=Init(photo((100, 200))), size=(96, 32)).shape[1:3] == (96, 32)


def test_a_control_acts_in_its_part_of_the_steps_that_are_done(sd):
    """Of ten steps five are done; a control of their second half acts in the last two or three, not in none."""
    acting = []
    net = small_control(sd)
    net.middle_zero_conv.register_forward_hook(lambda *_: acting.append(1))
    arrays(sd, controls=[Control(net, hint(), start=0.6)], init=Init(photo(), 0.5), steps=10)
    assert len(acting) == 2


# ------------------------------------------------------------------------------------------------------ inpainting


def test_what_is_black_in_the_mask_keeps_every_bit(sd):
    image = arrays(sd, init=Init(photo(), 1.0, left_half()))[0]
    assert np.array_equal(image[:, 32:], np.asarray(photo())[:, 32:])
    assert differ(image[:, :32], np.asarray(photo())[:, :32])


def test_what_is_made_anew_knows_the_rest(sd):
    """The known part enters every step: with another photograph on the right the left is another."""
    one, other = (arrays(sd, init=Init(photo(seed=seed), 1.0, left_half()))[0] for seed in (3, 4))
    assert differ(one[:, :32], other[:, :32])
    assert differ(one[:, :32], arrays(sd)[0][:, :32])


def test_a_white_mask_is_image_to_image(sd):
    white = Image.new("L", (64, 64), 255)
    for strength in (0.5, 1.0):
        masked, plain = (arrays(sd, init=Init(photo(), strength, mask)) for mask in (white, None))
        assert np.array_equal(masked, plain)


def test_a_gray_mask_blends(sd):
    gray = Image.new("L", (64, 64), 128)
    image = arrays(sd, init=Init(photo(), 1.0, gray))[0].astype(int)
    assert 0 < np.abs(image - np.asarray(photo())).mean() < 70


def test_mask_and_image_are_resized_alike(sd):
    init = Init(photo((100, 200)), 1.0, left_half((100, 200)))
    image = arrays(sd, init=init)[0]
    assert np.array_equal(image[:, 66:], np.asarray(resized(photo((100, 200)), (64, 128)))[:, 66:])


def spot(size, box):
    """White in the box, so made anew."""
    image = Image.new("L", size)
    image.paste(255, box)
    return image


def test_a_part_of_a_much_smaller_hint_is_a_pixel_at_least():
    mask = Image.new("L", (2048, 2048))
    mask.paste(255, (0, 0, 8, 8))
    part = Init(photo((2048, 2048)), mask=mask, only_masked=0).part(photo((128, 128)), (64, 64))
    assert part.size == (1, 1)


@pytest.mark.parametrize(
    "box", [(40, 30, 60, 50), (0, 0, 10, 10), (140, 90, 150, 99), (10, 10, 140, 20), (5, 0, 9, 99)]
)
@pytest.mark.parametrize("options", [{}, {"mask_blur": 3}, {"size": (64, 128)}, {"only_masked": 0}])
def test_only_the_masked_part_is_made_and_put_back_at_the_images_size(sd, box, options):
    whole, mask = photo((99, 150)), spot((150, 99), box)
    size, settings = options.get("size"), {"only_masked": 8, **options}
    settings.pop("size", None)
    init = Init(whole, 1.0, mask, **settings)
    image = arrays(sd, init=init, size=size, steps=1)[0]
    kept = np.asarray(init.soft_mask) == 0
    assert image.shape == (99, 150, 3) and np.array_equal(image[kept], np.asarray(whole)[kept])
    assert differ(image[~kept], np.asarray(whole)[~kept])
    if not settings.get("mask_blur"):
        left, top, right, bottom = init.box(size or default_size(sd.config, init.part(whole)))
        assert left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]


def test_the_part_is_made_as_if_it_were_an_image_of_its_own(sd):
    """So a hint of the whole view is cut, too, also a smaller one."""
    whole, mask, net = photo((128, 256)), spot((256, 128), (96, 32, 160, 96)), small_control(sd)
    box = (64, 0, 192, 128)
    for shrink in (1, 2):
        shape = (256 // shrink, 128 // shrink)
        hint = HintImage(photo(shape[::-1], seed=5), "inpaint", mask=spot(shape, (90 // shrink, 0, *shape)))
        init = Init(whole, 1.0, mask, only_masked=32)
        assert init.box() == box
        (image,) = generate(sd, "a", [Control(net, hint)], steps=2, init=init)
        cut = [side // shrink for side in box]
        part = HintImage(hint.image.crop(cut), "inpaint", mask=hint.mask.crop(cut))
        (want,) = generate(sd, "a", [Control(net, part)], steps=2, init=Init(whole.crop(box), 1.0, mask.crop(box)))
        want = np.asarray(resized(want, (128, 128)))[40:88, 40:88]  # enlarging mixes in what is near the edges
        assert np.array_equal(np.asarray(image)[40:88, 104:152], want)


def test_a_blurred_mask_has_soft_edges():
    soft = np.asarray(Init(photo(), mask=left_half(), mask_blur=4).soft_mask)
    assert (soft[:, :32] == 255).all() and (soft[:, 48:] == 0).all()  # what is white is made anew
    assert 100 < soft[32, 32] < 155 and (np.diff(soft[32, 31:48].astype(int)) <= 0).all() and len(np.unique(soft)) > 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"only_masked": 4}, "nothing is masked: give a mask"),
        ({"only_masked": 4, "mask": Image.new("L", (64, 64))}, "nothing is masked: give a mask"),
        ({"mask_blur": 4}, "the mask is to be soft, but nothing is masked"),
        ({"fit": "squeeze"}, 'fit is "squeeze", expected one of stretch, crop, pad'),
        ({"strength": 1.5}, "the strength is 1.5, expected 0 .* to 1"),
        ({"strength": -0.1}, "the strength is -0.1"),
        ({"mask": left_half((64, 32))}, "the mask is 32x64 .* expected the image's 64x64"),
    ],
)
def test_an_init_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Init(photo(), **options)


# ------------------------------------------------------------------------------------------------------ low memory


def test_low_memory_makes_the_same_image(sd):
    controls = [Control(small_control(sd), hint(), prompt_only=True)]
    for options in ({}, {"init": Init(photo(), 0.7, left_half())}):
        plain, low = (arrays(sd, controls=controls, cpu_offload=device, **options) for device in (None, "cpu"))
        assert np.abs(plain.astype(int) - low).max() <= 1


def test_each_network_is_on_the_device_only_while_it_is_used(sd, monkeypatch):
    moves = []
    names = {id(sd.text_encoder): "text", id(sd.vae): "vae", id(sd.unet): "unet"}
    control = Control(small_control(sd), hint())
    names[id(control.net)] = "control"
    plain = torch.nn.Module.to

    def to(module, *args):
        if id(module) in names:
            moves.append((names[id(module)], str(args[0])))
        return plain(module, "cpu")

    monkeypatch.setattr(torch.nn.Module, "to", to)
    arrays(sd, controls=[control], cpu_offload="cuda", init=Init(photo()))
    used = [["vae"], ["text"], ["unet", "control"], ["vae"]]
    assert moves == [(name, device) for group in used for device in ("cuda", "cpu") for name in group]


def test_an_autoencoder_whose_halves_overflow_is_computed_in_fp32():
    half, full = small_sd(SMALLEST), small_sd(SMALLEST)
    for sd in (half, full):
        sd.vae.decoder.conv_in.weight *= 5e3
        sd.vae.decoder.norm_out.weight *= 0.1
    half.vae.half()
    assert not half.vae.decode(draws(0, 1)[0].half()).isfinite().all()
    assert np.abs(arrays(half).astype(int) - arrays(full)).max() <= 2
    latents = draws(0, 1)[0]
    with torch.autocast("cpu", torch.float16):  # which computes fp32 weights in half as well
        assert not full.vae.decode(latents).isfinite().all()
        (image,) = decode(full, latents, tiled=False)
    assert image == to_pil(full.decode(latents)[0])
    assert half.vae.quant_conv.weight.dtype == torch.float16  # the caller's stays as it was


def test_of_a_batch_only_what_overflows_is_decoded_again(monkeypatch):
    sd = small_sd(SMALLEST)
    sd.vae.decoder.conv_in.weight *= 5e3
    sd.vae.decoder.norm_out.weight *= 0.1
    latents = torch.cat([1e-3 * draws(0, 1)[0], draws(1, 1)[0], 1e-3 * draws(2, 1)[0]])
    want = [np.asarray(to_pil(image)).astype(int) for image in sd.decode(latents)]
    sd.vae.half()
    calls, plain = [], sd.decode
    monkeypatch.setattr(sd, "decode", lambda z: calls.append((len(z), sd.vae.quant_conv.bias.dtype)) or plain(z))
    images = decode(sd, latents, tiled=False)
    assert calls == [(3, torch.float16), (1, torch.float32)]
    assert all(np.abs(np.asarray(image) - other).max() <= 2 for image, other in zip(images, want, strict=True))


def test_a_batch_is_decoded_in_parts_where_memory_is_short(sd, monkeypatch):
    latents, calls, plain, in_tiles = torch.cat(draws(0, 5)), [], sd.decode, offload.decode_tiled
    monkeypatch.setattr(sd, "decode", lambda z: calls.append(len(z)) or plain(z))
    monkeypatch.setattr(offload, "decode_tiled", lambda vae, z: calls.append(len(z)) or in_tiles(vae, z))
    one = decoding_memory(SMALLEST, (64, 64), torch.float32, tiled=False)
    want = [np.asarray(image).astype(int) for image in decode(sd, latents, tiled=False)]
    for free, tiled, sizes in ((2.5 * one, False, [2, 2, 1]), (0, False, [1] * 5), (2.5 * one, True, [3, 2])):
        calls.clear()
        monkeypatch.setattr("controlnet.inference.memory.free_memory", lambda device, free=free: int(free))
        images = decode(sd, latents, tiled)
        assert calls == sizes
        assert all(np.abs(np.asarray(image) - other).max() <= 1 for image, other in zip(images, want, strict=True))


@pytest.mark.parametrize(
    "layer",
    [
        "unet.encoder.blocks.2.conv.conv",
        "unet.decoder.conv_out",
        "vae.decoder.conv_in",
        "text_encoder.blocks.0.mlp.contract",
    ],
)
def test_values_that_are_not_finite_stop_with_the_layers_name(layer):
    sd = small_sd(SMALLEST)
    network, _, name = layer.partition(".")
    getattr(sd, network).get_submodule(name).bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"^{layer}, computed in float32, gives values that are not finite"):
        arrays(sd)


def test_a_preview_of_what_is_not_finite_names_the_layer_it_comes_from():
    sd = small_sd(SMALLEST)
    sd.unet.decoder.conv_out.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="^unet.decoder.conv_out, computed in float32"):
        arrays(sd, callback=lambda progress: progress.preview())


def test_the_control_that_is_not_finite_is_named(sd):
    controls = [Control(small_control(sd), hint()) for _ in range(2)]
    controls[1].net.zero_convs[1].weight[0] = torch.inf
    with pytest.raises(FloatingPointError, match="^control 2.zero_convs.1, computed in float32, gives values that"):
        arrays(sd, controls=controls)
