"""The CPU never waits for the GPU while it samples: with fake CUDA tensors, and a record of what would wait."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fakes import needs_fake_cuda
from PIL import Image
from small import SMALL
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from controlnet.guidance import Control, exact
from controlnet.inference.generate import make_denoise
from controlnet.inference.image_to_image import Init, begin
from controlnet.inference.noise import noise_from
from controlnet.model import ControlNet
from controlnet.reuse import reusing
from ldm.samplers import SAMPLERS, sample, timesteps_for
from ldm.schedule import Schedule
from ldm.stable_diffusion import StableDiffusion

pytestmark = needs_fake_cuda

CUDA = torch.device("cuda:0")
LEVELS = {"multipliers": (1,), "attention": (False,), "heads": (1,)}  # fake attention takes long; the middle has it
TINY = replace(SMALL, unet=replace(SMALL.unet, channels=8, groups=2, **LEVELS))
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "bincount"}


class Waiting(TorchDispatchMode):
    """Names the operations for which the CPU waits: what reads a value, what copies other than from pinned memory."""

    def __init__(self):
        super().__init__()
        self.operations, self.found, self.pinned = 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        result = func(*args, **kwargs)
        self.operations += 1
        if name in ("_to_copy", "copy_"):
            source, device = (args[1], args[0].device) if name == "copy_" else (args[0], result.device)
            fetched = kwargs.get("non_blocking") and any(source is tensor for tensor in self.pinned)
            if source.device != device and not fetched:
                self.found.append(f"{name} from {source.device} to {device}")
        if name in READS or (name.startswith("index") and isinstance(args[1], list | tuple)):
            indices = [index for index in args[1] if index is not None] if name not in READS else []
            if name in READS or any(index.dtype == torch.bool or index.device != CUDA for index in indices):
                self.found.append(name)
        return result


@contextmanager
def waiting():
    """-> the record of what is done inside."""
    record = Waiting()
    with pytest.MonkeyPatch.context() as patch, record:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: record.pinned.append(tensor) or tensor)
        yield record


class Table:
    """Numbers of the schedule, which are real, where all tensors are fake."""

    def __init__(self, values):
        self.values = values.tolist()

    def __getitem__(self, index):
        chosen = [self.values[i] for i in index] if isinstance(index, list) else self.values[index]
        return SimpleNamespace(tolist=lambda: chosen, item=lambda: chosen)


@pytest.fixture(scope="module")
def fake():
    """A base and its ControlNet on a GPU that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with CUDA:
            sd = StableDiffusion(TINY)
            net = ControlNet(sd.unet)
        with unset_fake_temporarily():
            sd.schedule = Schedule(TINY.schedule)
            assert len(sd.schedule.noise_ratios) == 1000  # and kept
        sd.schedule.alphas_cumprod = Table(sd.schedule.alphas_cumprod)
        yield sd, net


@pytest.mark.parametrize(
    "sampler, eta, controls, inpainting, options",
    [
        ("ddim", 0.0, [{}], False, {"batched": True, "reuse": 1}),
        ("ddim", 1.0, [{"end": 0.4}, {"start": 0.3, "mask": True}], True, {"batched": True, "reuse": 2}),
        ("ddpm", 0.0, [{"prompt_only": True, "end": 0.7}], True, {"batched": False, "reuse": 1}),
        ("dpm++", 0.0, [{"start": 0.6, "scale": 0.5}], False, {"batched": False, "reuse": 2}),
        ("dpm++-sde-karras", 0.0, [{"start": 0.3}], True, {"batched": True, "reuse": 1}),
        ("heun", 0.0, [{"end": 0.4}], True, {"batched": True, "reuse": 2}),
    ],
)
def test_sampling_waits_for_nothing(fake, sampler, eta, controls, inpainting, options):
    sd, net = fake
    timesteps = timesteps_for(sampler, sd.schedule, 3)
    hint, mask = torch.empty(1, 3, 32, 32, device=CUDA), torch.empty(1, 1, 32, 32, device=CUDA)
    given = [Control(net, hint, **{**one, "mask": mask if one.get("mask") else None}) for one in controls]
    context = torch.empty(2, 77, TINY.unet.context_width, device=CUDA)
    noise, x, keep = noise_from([torch.Generator(), torch.Generator()]), torch.empty(2, 4, 4, 4, device=CUDA), None
    if inpainting:
        init = Init(Image.new("RGB", (32, 32)), 1.0, Image.new("L", (32, 32), 255))
        x, keep = begin(init, torch.empty_like(x), x, noise, sd.schedule, timesteps)
    predictor = exact if options["reuse"] == 1 else reusing(options["reuse"])
    denoise = make_denoise(sd, context, context, 2.0, given, timesteps, options["batched"], predictor)
    on_step = lambda i, x, x0: None  # noqa: E731
    with waiting() as record:
        y = sample(sampler, denoise, x, sd.schedule, 3, eta, noise, keep, on_step)
    assert y.shape == x.shape and y.device == CUDA and record.operations > 300
    assert bool(record.pinned) == (inpainting or eta > 0 or SAMPLERS[sampler].draws)
    assert record.found == ["_to_copy from cpu to cuda:0"] * 2  # the schedule's two tables, before the first step


def test_the_record_finds_what_waits(fake):
    x = torch.zeros(3, device=CUDA)
    with waiting() as record:
        x.cpu()
        torch.tensor([1.0], device=CUDA)
        torch.zeros(3).to(CUDA, non_blocking=True)  # not pinned
        x[torch.zeros(3, dtype=torch.long)]
        torch.full((3,), 5, device=CUDA)
        torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)
    assert len(record.found) == 4
    with pytest.raises(Exception, match="_local_scalar_dense"), waiting():  # fake tensors have no values
        x[0].item()
