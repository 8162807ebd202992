"""One call from prompt and hints to images: what decides over an image, and what does not."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import SMALL, SMALLEST, small_control, small_sd

from controlnet.common.image_files import read_image
from controlnet.common.images import fitted_size, resized, save_png, to_pil
from controlnet.guidance import Control
from controlnet.hints.hint_image import HintImage
from controlnet.inference.generate import generate
from controlnet.inference.image_to_image import Init
from controlnet.inference.memory import Plan, default_batch_size
from controlnet.inference.options import Options
from controlnet.inference.run import Job, with_controls
from controlnet.inference.sizes import default_cfg, default_size, size_multiple
from ldm.config import SD15, SD21, TINY


@pytest.fixture(scope="module")
def sd():
    return small_sd(SMALLEST)


@pytest.fixture(scope="module")
def net(sd):
    return small_control(sd)


def hint(seed=0, size=(64, 64)):
    """Four fields of black or white in each channel."""
    fields = torch.randint(0, 2, (1, 3, 2, 2), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(fields.float(), size)


def arrays(sd, prompt="a circle", controls=(), **options):
    """`generate` in two steps, as arrays (count, H, W, 3)."""
    return np.stack([np.asarray(image) for image in generate(sd, prompt, controls, **{"steps": 2, **options})])


def differ(a, b):
    return np.abs(a.astype(int) - b).max() > 3  # clearly, not by a rounding


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"sampler": "ddpm"}, {"sampler": "dpm++"}], ids=str)
def test_an_image_follows_from_its_seed_alone(sd, options):
    images = arrays(sd, count=3, seed=5, **options)
    assert images.shape == (3, 64, 64, 3) and images.dtype == np.uint8 and images.std() > 10
    assert differ(images[0], images[1])
    torch.randn(7)  # the global generator has no part in it
    assert np.array_equal(arrays(sd, count=1, seed=7, **options)[0], images[2])


def test_stochastic_samplers_draw_new_noise_in_every_step(sd):
    assert differ(arrays(sd, eta=1.0), arrays(sd, eta=0.0))


def test_prompt_negative_and_guidance_change_the_image(sd):
    plain = arrays(sd)
    assert differ(arrays(sd, "a square"), plain)
    assert differ(arrays(sd, negative="a square"), plain)
    assert differ(arrays(sd, cfg=1.0), plain)
    assert np.array_equal(arrays(sd, cfg=1.0, negative="a square"), arrays(sd, cfg=1.0))
    assert np.array_equal(arrays(sd, cfg=default_cfg(SMALLEST)), plain)


def test_the_default_guidance_depends_on_the_base():
    assert [default_cfg(config) for config in (SD15, SD21, TINY)] == [7.5, 7.5, 2.5]


def test_every_step_is_reported(sd):
    steps = []
    arrays(
        sd, count=2, steps=3, callback=lambda p: steps.append((p.image, p.step, p.steps, tuple(p.x.shape), p.x.dtype))
    )
    assert steps == [(image, step, 3, (1, 4, 8, 8), torch.float32) for image in (0, 1) for step in (1, 2, 3)]


# ------------------------------------------------------------------------------------------------------------ batches


def photo():
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def right_half():
    """White, so made anew."""
    return Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 32, axis=1).repeat(64, axis=0))


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 1.0},
        {"sampler": "ddpm", "cfg": 1.0},
        {"sampler": "dpm++", "reuse": 2, "steps": 3},
        {"init": Init(photo(), 0.5)},
        {"init": Init(photo(), 1.0, right_half()), "cpu_offload": "cpu"},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_image_of_a_batch_is_the_one_made_alone_to_rounding(sd, net, options):
    """Each has its own noise: at the start, of the autoencoder, of the sampler and of the known part."""
    controls = [Control(net, hint(), end=0.5), Control(net, hint(1), 0.5, prompt_only=True)]
    sizes = []
    handle = sd.unet.encoder.middle.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    together = arrays(sd, controls=controls, count=3, batch_size=2, seed=5, **options)
    handle.remove()
    branches = 1 if {"cpu_offload", "cfg"} & options.keys() else 2
    assert set(sizes) == {2 * branches, branches}  # the last batch is what is left
    alone = arrays(sd, controls=controls, count=3, batch_size=1, seed=5, **options)
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert np.array_equal(together[2], alone[2]) and differ(alone[0], alone[1])
    again = arrays(sd, controls=controls, count=2, batch_size=2, seed=5, **options)
    assert np.array_equal(again, together[:2])


def test_every_step_of_each_image_in_a_batch_is_reported(sd):
    told, alone = [], []
    arrays(sd, count=3, batch_size=2, callback=told.append)
    assert [(p.image, p.step) for p in told] == [(0, 1), (1, 1), (0, 2), (1, 2), (2, 1), (2, 2)]
    arrays(sd, count=3, callback=alone.append)
    for one in alone:
        (same,) = [p for p in told if (p.image, p.step) == (one.image, one.step)]
        assert same.x.shape == (1, 4, 8, 8)
        torch.testing.assert_close(same.x0, one.x0, atol=1e-3, rtol=1e-3)
        assert np.abs(np.asarray(same.preview()).astype(int) - np.asarray(one.preview())).max() <= 1


def test_no_images_are_no_error(sd):
    assert generate(sd, "a", count=0) == generate(sd, "a", count=0, batch_size=2, init=Init(photo())) == []


def test_a_callback_may_end_a_batch(sd):
    def stop(progress):
        if (progress.image, progress.step) == (1, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arrays(sd, count=2, batch_size=2, callback=stop)


def test_by_default_a_gpus_memory_is_filled_and_a_cpu_makes_one_after_the_other(monkeypatch):
    def default(count, images_that_fit, device="cuda"):
        plan = Plan(SMALLEST, (64, 64), torch.float32, controls=0)
        monkeypatch.setattr("controlnet.inference.memory.free_memory", lambda _: int(images_that_fit * plan.guided()))
        return default_batch_size(plan, count, torch.device(device))

    assert [default(count, 5.5) for count in (1, 3, 40)] == [1, 3, 5]
    assert default(40, 1000) == 16 and default(40, 0.5) == 1
    assert default(40, 1000, "cpu") == 1


def test_what_fits_is_asked_of_the_images_that_are_made(sd, net, monkeypatch):
    """By `generate`, and by infer.py, which records it."""
    asked = []
    for module in ("generate", "run"):
        fits = f"controlnet.inference.{module}.default_batch_size"
        monkeypatch.setattr(fits, lambda *question: asked.append(question) or 1)
    control = Control(net, hint(size=(96, 64)))
    arrays(sd, controls=[control], steps=1, cfg=1, cpu_offload="cpu", tile_diffusion=True)
    options = Options(low_memory=True, tile_diffusion=True)
    hints = [SimpleNamespace(control=lambda net, size: control)]
    job = Job(options, (96, 64), 1.0, torch.device("cpu"), None, hints, 1, {}, None)
    assert with_controls(job, lambda hint: net, sd).batch_size == 1
    plan = Plan(SMALLEST, (96, 64), torch.float32, 1, low_memory=True, tile_diffusion=True)
    assert asked == [(plan, 1, torch.device("cpu"))] * 2


# ------------------------------------------------------------------------------------------------------------ precision


def test_no_gradients_and_no_changed_arguments():
    sd = small_sd(SMALLEST)
    net = small_control(sd).requires_grad_(True)
    control, gradients = Control(net, hint()), []
    for part in (net.hint_encoder, sd.vae.decoder):
        part.requires_grad_(True).register_forward_hook(lambda _, x, y: gradients.append(y.requires_grad))
    before = control.hint.clone()
    arrays(sd, controls=[control])
    assert gradients == [False, False]
    assert torch.equal(control.hint, before)


def test_half_precision_is_near_full_precision_and_latents_stay_fp32():
    half = small_sd().to(torch.bfloat16)
    control = Control(small_control(half).to(torch.bfloat16), hint())
    dtypes = set()
    image = arrays(half, controls=[control], callback=lambda p: dtypes.add(p.x.dtype))
    full = small_sd()
    exact = arrays(full, controls=[replace(control, net=small_control(full))])
    assert dtypes == {torch.float32}
    assert np.abs(image.astype(int) - exact).mean() < 8


# ------------------------------------------------------------------------------------------------------------ controls


def test_a_control_of_scale_0_is_none(sd, net):
    assert np.array_equal(arrays(sd, controls=[Control(net, hint(), 0.0)]), arrays(sd))


def test_control_hint_and_scale_change_the_image(sd, net):
    image = arrays(sd, controls=[Control(net, hint())])
    assert differ(image, arrays(sd))
    assert differ(image, arrays(sd, controls=[Control(net, hint(1))]))
    assert differ(image, arrays(sd, controls=[Control(net, hint(), 0.5)]))


def test_controls_add_up(sd, net):
    one, half = Control(net, hint()), Control(net, hint(), 0.5)
    difference = np.abs(arrays(sd, controls=[half, half]).astype(int) - arrays(sd, controls=[one]))
    assert difference.max() <= 1
    assert differ(arrays(sd, controls=[one, Control(net, hint(1))]), arrays(sd, controls=[one]))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_each_image_has_its_own_of_several_hints_and_masks(sd, net, batch_size):
    mask = (torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(5)) > 0.5).float()
    hints = torch.cat([hint(i) for i in range(3)])
    images = arrays(sd, count=3, controls=[Control(net, hints, mask=mask)], batch_size=batch_size)
    for i, image in enumerate(images):
        alone = arrays(sd, seed=i, controls=[Control(net, hints[i : i + 1], mask=mask[i : i + 1])])[0]
        assert np.abs(image.astype(int) - alone).max() <= 1
    with pytest.raises(ValueError, match="a hint is a batch of 3, expected 1 or 2, one for each image"):
        arrays(sd, count=2, controls=[Control(net, hints)])


# ------------------------------------------------------------------------------------------------------------ sizes


def test_the_size_is_the_hints_or_the_models_or_the_one_asked_for(sd, net):
    wide = Control(net, hint(size=(32, 96)))
    assert arrays(sd, controls=[wide]).shape[1:3] == (32, 96)
    assert arrays(sd).shape[1:3] == (64, 64)
    assert arrays(sd, size=(96, 32)).shape[1:3] == (96, 32)


def test_the_multiple_of_a_size_is_what_the_networks_halve():
    assert [size_multiple(config) for config in (SD15, SD21, TINY, SMALL)] == [64, 64, 32, 32]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"size": (64, 100)},
            "the image's size is 100x64 (width x height), expected multiples of 16 up to 8192: take 96x64",
        ),
        (
            {"size": (0, 64)},
            "the image's size is 64x0 (width x height), expected multiples of 16 up to 8192: take 64x16",
        ),
        ({"size": (64, 10**40)}, f"the image's size is {10**40}x64 (width x height), expected multiples of 16 up to"),
        ({"cfg": -1.0}, "the guidance (cfg) is -1.0, expected 0 (the negative prompt alone), 1 "),
        ({"cfg": float("nan")}, "the guidance (cfg) is nan, "),
        ({"count": 2**64}, f"the number of images is {2**64}, more than there are seeds"),
        ({"seed": -1}, f"the seed is -1, expected 0 to {2**32 - 1}: "),
        ({"seed": 2**32 + 7}, f"the seed is {2**32 + 7}, expected 0 to {2**32 - 1}: take 7"),
        ({"seed": 2**32 - 1, "count": 2}, f"the seed is {2**32 - 1}, expected 0 to {2**32 - 2}: take {2**32 - 2}"),
        ({"sampler": "plms"}, 'the sampler is "plms", expected one of ddim, ddpm, dpm++'),
        ({"steps": 0}, "the number of steps is 0, expected 1..1000"),
        ({"batch_size": 0}, "the batch size is 0, expected 1 (one image after the other) or more"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_made_is_said_in_a_sentence(sd, options, message):
    with pytest.raises(ValueError) as caught:
        arrays(sd, **options)
    assert str(caught.value).startswith(message)


def test_a_hint_of_another_size_is_refused(sd, net):
    with pytest.raises(ValueError, match=r"a hint is 96x64 .* expected the image's 64x64"):
        arrays(sd, controls=[Control(net, hint()), Control(net, hint(size=(64, 96)))])


def test_an_image_that_is_not_finite_is_refused():
    broken = small_sd(SMALLEST)
    broken.unet.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(
        FloatingPointError,
        match="^unet.decoder.conv_out, computed in float32, gives values that are not finite: take a lower guidance",
    ):
        arrays(broken)


# ------------------------------------------------------------------------------------------------------------ images


def test_values_are_cut_off_as_in_the_published_demos():
    y = torch.linspace(-1.2, 1.2, 3 * 1000).reshape(3, 10, 100)
    want = (y.numpy().transpose(1, 2, 0) * 127.5 + 127.5).clip(0, 255).astype(np.uint8)
    image = to_pil(y)
    assert image.mode == "RGB" and image.size == (100, 10)
    assert np.array_equal(np.asarray(image), want)
    assert want.min() == 0 and want.max() == 255


@pytest.mark.parametrize(
    "size, resolution, multiple, want",
    [
        ((100, 100), 512, 64, (512, 512)),
        ((480, 640), 512, 64, (512, 704)),  # 682.7
        ((1000, 1500), 512, 64, (512, 768)),
        ((600, 675), 512, 64, (512, 576)),  # 576
        ((512, 544), 512, 64, (512, 512)),  # 8.5 multiples: to even, as numpy's round
        ((512, 512), 128, 32, (128, 128)),
        ((900, 300), 128, 32, (384, 128)),
    ],
)
def test_the_short_side_is_the_resolution_and_each_side_a_multiple(size, resolution, multiple, want):
    assert fitted_size(Image.new("RGB", size[::-1]), resolution, multiple) == want


def test_a_strip_of_an_image_is_not_fitted():
    assert fitted_size(Image.new("RGB", (1600, 100)), 128, 32) == (128, 2048)
    with pytest.raises(ValueError, match="1601x100 .* expected at most 16 times as long as wide"):
        fitted_size(Image.new("RGB", (1601, 100)), 128, 32)


def test_the_default_size_is_the_resolution_in_the_hints_shape():
    assert default_size(SD21) == (768, 768)
    assert default_size(SD15, Image.new("RGB", (640, 480))) == (512, 704)


def test_images_shrink_by_area_and_grow_by_lanczos():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    mean = pixels.reshape(32, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(resized(image, (32, 64))) - mean).max() <= 1
    three = Image.fromarray(np.array([[0, 90, 240]] * 2, np.uint8))
    assert np.array_equal(resized(three, (1, 2)), [[30, 190]])  # the middle one is half the first's, half the last's
    edge = Image.fromarray(np.repeat(np.array([[64, 192]], np.uint8), 8, axis=1)[..., None].repeat(3, axis=2))
    assert resized(edge, (2, 64)) == edge.resize((64, 2), Image.Resampling.LANCZOS)
    assert resized(image, (64, 128)).tobytes() == image.tobytes()


def test_a_hint_is_between_0_and_1_in_rgb():
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :, 0] = 255
    pixels[:, :48, 1] = 51
    tensor = HintImage(Image.fromarray(pixels)).at((64, 96))
    assert tensor.shape == (1, 3, 64, 96) and tensor.dtype == torch.float32
    assert torch.equal(tensor[0, :, 0, 0], torch.tensor([1.0, 0.2, 0.0]))
    assert torch.equal(tensor[0, :, 0, 95], torch.tensor([1.0, 0.0, 0.0]))


def saved(image, path, **options):
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    for name, other in {"rgba.png": image, "palette.png": image.quantize(4), "la.png": image.convert("LA")}.items():
        pixels = saved(other, tmp_path / name)
        assert pixels.shape == (1, 2, 3) and (pixels[0, 1] == 255).all() and (pixels[0, 0] < 255).any(), name
    image.putpixel((0, 0), (200, 0, 0, 51))  # a fifth of it
    assert saved(image, tmp_path / "half.png")[0, 0].tolist() == [244, 204, 204]


def test_16_bits_are_not_clipped(tmp_path):
    depth = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert saved(depth, tmp_path / "depth.png")[0, :, 1].tolist() == [0, 100, 255]


def test_an_image_is_upright_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert saved(Image.new("RGB", (8, 4)), tmp_path / "turned.png", exif=exif).shape == (8, 4, 3)


def test_files_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    for name, what in {
        "text.png": "is not readable as an image",
        "cut.png": "is not readable as an image",
        "float.tiff": "has 32 bits a channel",
        "none.png": "does not exist: give the path of an image",
        ".": "is a folder",
    }.items():
        with pytest.raises(ValueError, match=what) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_an_image_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "image.png"
    save_png(Image.new("RGB", (4, 4), "red"), path, {"note": "größer – 大"})
    assert Image.open(path).text == {"note": "größer – 大"}

    def fail(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    before = path.read_bytes()
    with pytest.raises(OSError, match="no space left"):
        save_png(Image.new("RGB", (4, 4)), path, {})
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["image.png"]
