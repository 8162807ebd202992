"""What an image takes and what is free: the rules against what the networks really allocate, and containers' limits."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from controlnet.guidance import Control, guided
from controlnet.inference import memory
from controlnet.model import ControlNet
from controlnet.training.simulation import StorageCounter, make_fake
from ldm.checkpoints.load import without_weights
from ldm.config import TINY
from ldm.stable_diffusion import StableDiffusion

SIZE, FP32 = (256, 256), torch.float32
PLAN = memory.Plan(TINY, SIZE, FP32, controls=1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def fakes():
    """The small base and a ControlNet, without contents, and the mode in which they live."""
    with without_weights():
        sd = StableDiffusion(TINY).requires_grad_(False)
        net = ControlNet.from_unet(sd.unet).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        make_fake(sd)
        make_fake(net)
    return mode, sd, net


@pytest.mark.parametrize("batch_size, one_by_one, controls", [(3, False, 1), (1, True, 2), (1, False, 6)])
def test_a_guided_step_holds_what_the_rule_says(fakes, batch_size, one_by_one, controls):
    mode, sd, net = fakes
    with mode, torch.no_grad():
        x, context = torch.zeros(batch_size, 4, 32, 32), torch.zeros(batch_size, 77, TINY.unet.context_width)
        acting = [Control(net, torch.zeros(1, 3, *SIZE))] * controls
        denoise = guided(sd.unet, context, context, 7.5, acting, batched=not one_by_one)
        with StorageCounter() as counter:
            denoise(x, torch.zeros(batch_size, dtype=torch.int64), timestep=0)
    rule = batch_size * memory.Plan(TINY, SIZE, FP32, controls, low_memory=one_by_one).guided()
    assert counter.most <= rule <= 1.35 * counter.most


def test_decoding_holds_what_the_rule_says(fakes):
    mode, sd, _ = fakes
    with mode, torch.no_grad(), StorageCounter() as counter:
        sd.vae.decode(torch.zeros(1, 4, 32, 32))
    rule = memory.decoding_memory(TINY, SIZE, FP32, tiled=False)
    assert counter.most <= rule <= 1.3 * counter.most  # the kernels' workspaces are not counted


def test_networks_count_and_on_a_cpu_what_sampling_leaves():
    *base, control = memory.parameters(TINY)
    weights = 4 * (sum(base) + control)
    guided, decoding = PLAN.guided(), memory.decoding_memory(TINY, SIZE, FP32, False)
    assert PLAN.memory(CPU) == weights + guided + decoding
    assert PLAN.memory(CUDA) == weights + max(guided, decoding)
    large = (4096, 4096)  # whose blocks go back to the system
    decoding = memory.decoding_memory(TINY, large, FP32, False)
    assert replace(PLAN, size=large).memory(CPU) == weights + decoding
    two = replace(PLAN, size=large, controls=2).memory(CPU)
    assert two - weights - decoding == 4 * control > 0


def test_low_memory_has_the_networks_that_work_on_a_gpu_and_none_on_a_cpu():
    unet, vae, _, control = memory.parameters(TINY)
    for side in (256, 512):  # at the former sampling takes the most, at the latter decoding
        plan = replace(PLAN, size=(side, side), low_memory=True)
        sampling = max(plan.guided(), 4 * 3 * 16 * side**2)  # or the hint encoder's
        decoding = memory.decoding_memory(TINY, plan.size, FP32, True)
        assert plan.memory(CUDA) == max(4 * (unet + control) + sampling, 4 * vae + decoding)
        assert plan.memory(CPU) == max(sampling, plan.guided() + decoding)


def test_a_base_in_memory_is_not_counted_twice(monkeypatch):
    sd = SimpleNamespace(config=TINY, dtype=FP32)
    needed = PLAN.memory(CUDA)
    monkeypatch.setattr(memory, "free_memory", lambda device: needed - 4 * sum(memory.parameters(TINY)[:3]))
    memory.check_memory(PLAN, CUDA, held=memory.bytes_held(sd))
    with pytest.raises(ValueError, match="GB are free"):
        memory.check_memory(PLAN, CUDA, held=memory.bytes_held(sd) - 1)


def test_as_many_images_as_fit_are_made_at_once(monkeypatch):
    for free, count, expected in ((350, 8, 3), (350, 2, 2), (50, 8, 1), (None, 8, 8)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert memory.fitting(count, CUDA, each=100) == expected


def test_what_pytorch_keeps_on_cuda_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory.free_memory(CUDA) == 1300


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"memory.max": "max\n", "memory.current": "7\n", "memory.stat": "anon 1\n"}, None),
        ({"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 1\ninactive_file 150\n"}, 450),
        ({"memory.max": "1000\n", "memory.current": "1200\n", "memory.stat": "anon 1\n"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "600\n",
                "memory/memory.stat": "cache 5\ninactive_file 1\ntotal_inactive_file 50\n",
            },
            450,
        ),
    ],
)
def test_a_container_s_limit_counts(tmp_path, monkeypatch, files, expected):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory.free_in_cgroup(tmp_path) == expected
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    free = memory.free_memory(CPU)
    assert free == expected if expected is not None else free is None or free > 10**6
