"""What CUDA would refuse, found without a GPU: everything that runs there, on fake tensors of a CUDA device.

Fake tensors have a device, a type and a shape, but no numbers. Two devices in one operation are an error as on CUDA,
and autocast follows CUDA's rules. So are two types in one operation, which the CPU's kernels may take.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from fakes import needs_fake_cuda
from PIL import Image
from small import SMALL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlnet.config import ControlConfig
from controlnet.guidance import Control, exact, guided
from controlnet.inference.generate import generate
from controlnet.inference.image_to_image import Init
from controlnet.inference.offload import decode, encode
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss, Draws, EncodedPairs, loss_inputs
from controlnet.reuse import reusing
from ldm import StableDiffusion
from ldm.checkpoints.load import without_weights
from ldm.config import ScheduleConfig, UNetConfig
from ldm.unet import UNet

pytestmark = needs_fake_cuda

CUDA = torch.device("cuda", 0)
SIDE = 64
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# As SD 1.x and SD 2.x differ, with two levels.
UNET = UNetConfig(8, (1, 2), blocks=1, attention=(False, True), heads=(2, 2), context_width=16, groups=4)
CONFIGS = {
    "sd1": replace(SMALL, unet=UNET, schedule=ScheduleConfig("eps")),
    "sd2": replace(SMALL, unet=replace(UNET, linear_projections=True, fp32_logits=True), schedule=ScheduleConfig("v")),
    "inpainting": replace(SMALL, unet=replace(UNET, inpainting=True), schedule=ScheduleConfig("eps")),
}

FAKE = FakeTensorMode(allow_non_fake_inputs=True)

aten = torch.ops.aten
ONE_TYPE = {
    *(aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default),
    *(aten.native_group_norm.default, aten.native_layer_norm.default),
}
NORMS = (aten.native_group_norm.default, aten.native_layer_norm.default)


class CudaRules(TorchDispatchMode):
    """Above the fake tensors: real ones stay real on the CPU, and what is read back from CUDA is `number`."""

    number = 1
    norms: list[torch.dtype]  # of each norm

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to_cuda = "device" in kwargs and torch.device(kwargs["device"]).type == "cuda"
        if tensors and not to_cuda and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self.number
        types = {tensor.dtype for tensor in tensors}
        if func in ONE_TYPE and len(types) > 1:
            raise RuntimeError(f"{func} of {types}")
        if func in NORMS:
            self.norms += types
        return func(*args, **kwargs)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # fake tensors have none
    monkeypatch.setattr("controlnet.inference.offload.to_pil", lambda image: image)
    monkeypatch.setattr("controlnet.inference.predictors.graphed", exact)  # not as CUDA graphs
    rules = CudaRules()
    rules.norms = []
    with FAKE, rules:
        yield rules


def on_cuda(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With fake parameters in place of its own."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=dtype, device=CUDA)
            setattr(part, name, nn.Parameter(fake, parameter.requires_grad))
    return module


@cache
def base(style: str, dtype: torch.dtype) -> StableDiffusion:
    with unset_fake_temporarily(), without_weights():  # the schedule's tables are real
        sd = StableDiffusion(CONFIGS[style]).requires_grad_(False)
    return on_cuda(sd, dtype)


@cache
def control_of(style: str, dtype: torch.dtype, **config) -> ControlNet:
    with unset_fake_temporarily(), without_weights():
        control = ControlNet(UNet(CONFIGS[style].unet), ControlConfig(**config))
    return on_cuda(control, dtype)


HINT, MASK = torch.ones(1, 3, SIDE, SIDE), torch.ones(1, 1, SIDE, SIDE)  # on the CPU, where they are made


def check(tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    assert (tensor.device, tensor.dtype, tuple(tensor.shape)) == (CUDA, dtype, shape)


# ------------------------------------------------------------------------------------------------------ the rules hold


def test_two_devices_or_two_types_in_one_operation_are_an_error(cuda):
    x, w = torch.ones(1, 4, 8, 8, device=CUDA), torch.ones(4, 4, 3, 3, device=CUDA)
    with pytest.raises(RuntimeError, match="device"):
        F.conv2d(x, w.cpu())
    with pytest.raises(RuntimeError, match="convolution.* of "):
        F.conv2d(x.half(), w)
    with pytest.raises(RuntimeError, match="native_group_norm.* of "):
        F.group_norm(x.half(), 2, w[:, 0, 0, 0], w[:, 0, 0, 0])
    with torch.autocast("cuda", torch.float16):
        check(F.conv2d(x, w), torch.float16, 1, 4, 6, 6)
        check(F.group_norm(x.half(), 2), torch.float32, 1, 4, 8, 8)


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    "style, dtype, sampler, steps", [("sd1", FP32, "ddim", 1), ("sd1", FP16, "dpm++", 2), ("sd2", BF16, "ddpm", 2)]
)
def test_an_image_from_prompt_and_hints(cuda, style, dtype, sampler, steps, monkeypatch):
    """Attention gets q, k and v in the networks' type, which fused kernels need: with fp32 logits, too."""
    seen, attention = set(), F.scaled_dot_product_attention

    def spy(q, k, v, **settings):
        seen.update({q.dtype, k.dtype, v.dtype})
        return attention(q, k, v, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    control = Control(control_of(style, dtype), HINT, scale=0.5, prompt_only=True, start=0.5 * (steps - 1), mask=MASK)
    settings = {"steps": steps, "sampler": sampler, "eta": 1.0 if sampler == "ddim" else 0.0}
    (image,) = generate(base(style, dtype), "a (bird:1.2)", [control], negative="green", **settings)
    check(image, dtype, 3, SIDE, SIDE)
    assert seen == {dtype} and set(cuda.norms) == {dtype}


@pytest.mark.parametrize("style, options", [("sd1", {}), ("inpainting", {"reuse": 2})])
def test_an_image_from_an_image_with_a_mask(cuda, monkeypatch, style, options):
    monkeypatch.setattr(Init, "put_back", lambda init, image, start: image)
    photograph = Init(Image.new("RGB", (SIDE, SIDE)), strength=0.5, mask=Image.new("L", (SIDE, SIDE), 255))
    control = Control(control_of("sd1", FP16), HINT)
    (image,) = generate(base(style, FP16), "a bird", [control], steps=4, init=photograph, **options)
    check(image, FP16, 3, SIDE, SIDE)


def test_the_tiled_vae(cuda):
    sd = base("sd1", FP16)
    check(encode(sd, torch.zeros(1, 3, SIDE, SIDE), [torch.Generator()], tiled=True), FP16, 1, 4, 8, 8)
    (image,) = decode(sd, torch.zeros(1, 4, 8, 8, device=CUDA), tiled=True)
    check(image, FP16, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    "how, timesteps",
    [
        ({"cfg": 7.5, "batched": False}, [981]),
        ({"cfg": 1.0}, [981]),
        ({"cfg": 7.5, "make_predictor": reusing(2)}, [981, 501]),
    ],
)
def test_guidance_in_two_passes_without_the_negative_prompt_and_approximate(cuda, how, timesteps):
    sd, net = base("sd2", FP16), control_of("sd2", FP16, global_average_pooling=True)
    x, context = torch.zeros(1, 4, 8, 8, device=CUDA, dtype=FP16), sd.encode_text(["a bird"])
    controls = [Control(net, HINT.to(x)), Control(net, HINT.to(x), layers=[0.5] * (len(net.zero_convs) + 1))]
    denoise = guided(sd.unet, context, context, controls=controls, **how)
    for cuda.number in timesteps:
        check(denoise(x, torch.full((1,), cuda.number, device=CUDA)), FP16, 1, 4, 8, 8)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("style, dtype, unlocked", [("sd1", FP16, True), ("sd2", BF16, False)])
def test_the_loss_of_a_training_step(cuda, style, dtype, unlocked):
    """Norms are fp32 under CUDA's autocast: in what is trained, not in the locked base."""
    sd, control = base(style, dtype), control_of(style, FP32)
    with unset_fake_temporarily(), without_weights():
        unet = UNet(CONFIGS[style].unet).requires_grad_(False)
    on_cuda(unet, dtype)
    if unlocked:
        on_cuda(unet.decoder.requires_grad_(True), FP32)
    with torch.no_grad():
        moments, context = torch.zeros(2, 2, 4, 8, 8, dtype=dtype), sd.encode_text([""])
        cached = EncodedPairs(*moments, context.repeat(2, 1, 1).cpu())
    drawn = Draws((4, 8, 8), 1000, 0.5, seed=0)(range(2))
    inputs = loss_inputs(cached, HINT.repeat(2, 1, 1, 1), drawn, 0.2, context, CUDA)
    cuda.norms = []
    with torch.autocast("cuda", dtype):
        loss = ControlLoss(unet, control, sd.schedule, min_snr=5.0)(*inputs)
    check(loss, FP32)
    locked, trained = ([unet.encoder], [control, unet.decoder]) if unlocked else ([unet], [control])
    wanted = [dtype] * count_norms(locked) + [FP32] * count_norms(trained)
    assert loss.requires_grad and sorted(map(str, cuda.norms)) == sorted(map(str, wanted))


def count_norms(modules: list[nn.Module]) -> int:
    return sum(isinstance(part, nn.GroupNorm | nn.LayerNorm) for module in modules for part in module.modules())
