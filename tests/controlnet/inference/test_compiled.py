"""torch.compile around UNet and ControlNets: what is compiled when, and that the numbers stay."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import SMALL, small_control, strengthened
from torch._dynamo.exc import BackendCompilerFailed

from controlnet.guidance import Control, guided
from controlnet.inference.generate import generate
from controlnet.inference.predictors import compiling
from ldm.fast.packed import pack
from ldm.stable_diffusion import StableDiffusion

LEVELS = {"multipliers": (1,), "attention": (False,), "heads": (1,)}  # tracing takes long; the middle has attention
TINIEST = replace(SMALL, unet=replace(SMALL.unet, channels=8, groups=2, **LEVELS))
TIMESTEPS = [901, 601, 301, 1]


@pytest.fixture(scope="module")
def sd():
    torch.manual_seed(0)
    return strengthened(StableDiffusion(TINIEST)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net(sd):
    return small_control(sd)


@pytest.fixture(scope="module")
def graphs():
    """All that were compiled so far."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


@pytest.fixture(scope="module")
def make_predictor(graphs):
    """With a backend that computes the graph as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(function, mode, dynamic, plain=torch.compile):
        return plain(function, backend=backend, dynamic=dynamic, fullgraph=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile)
        return compiling.__wrapped__()


@pytest.fixture(autouse=True)
def used(make_predictor, monkeypatch):
    """By `generate`, too."""
    monkeypatch.setattr("controlnet.inference.predictors.compiling", lambda: make_predictor)


def hint(seed):
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_one_graph_serves_all_steps_prompts_and_hints(sd, net, graphs, make_predictor):
    for seed in (0, 1):
        torch.manual_seed(seed)
        contexts, x = torch.randn(2, 2, 77, 16), torch.randn(2, 4, 4, 4)
        controls = [Control(net, hint(seed), end=0.5, prompt_only=True)]
        compiled, plain = (
            guided(sd.unet, *contexts, 3.0, controls, TIMESTEPS, make_predictor=predictor)
            for predictor in (make_predictor, None)
        )
        for i, timestep in enumerate(TIMESTEPS):
            t = torch.full((2,), timestep)
            torch.testing.assert_close(compiled(x, t, timestep), plain(x, t, timestep), rtol=1e-4, atol=1e-4)
            assert len(graphs) == (2 if seed or i >= 2 else 1)  # one with the control, one without


def test_images_are_the_same_to_rounding_and_share_the_graph(sd, net, graphs):
    """As in infer.py: each call prepares its controls anew."""
    options = dict(steps=2, size=(32, 32), count=2, batch_size=2)
    for prompt in ("a", "b"):
        controls = [Control(net, hint(2), end=0.5, prompt_only=True)]
        plain, made = (generate(sd, prompt, controls, compile=compile, **options) for compile in (False, True))
        for one, other in zip(plain, made, strict=True):
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    assert len(graphs) == 2


def test_a_layer_that_is_not_finite_is_found_inside_the_graph(sd, graphs):
    broken = copy.deepcopy(sd)
    broken.unet.decoder.blocks[1].res.conv1.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="^unet.decoder.blocks.1.res.conv1, computed in float32"):
        generate(broken, "a", steps=1, size=(32, 32), count=2, batch_size=2, compile=True)
    assert len(graphs) == 2


def test_where_nothing_can_be_compiled_it_is_said(sd, monkeypatch):
    def fail(*_):
        raise BackendCompilerFailed(lambda: None, RuntimeError("No working C++ compiler\nin this and that place"), None)

    monkeypatch.setattr("torch.compile", lambda function, **options: fail)
    monkeypatch.setattr("controlnet.inference.predictors.compiling", compiling.__wrapped__)
    with pytest.raises(ValueError, match=r"^torch.compile fails here \(No working C\+\+ compiler\): it needs a C\+\+"):
        generate(sd, "a", steps=1, size=(32, 32), compile=True)


@pytest.mark.parametrize("options, other", [({"reuse": 2}, "--reuse"), ({"cpu_offload": "cpu"}, "--low-memory")])
def test_what_goes_with_no_graph_is_refused(sd, options, other):
    with pytest.raises(ValueError, match=f"--compile and {other} exclude each other"):
        generate(sd, "a", compile=True, **options)


def test_packed_weights_are_not_compiled():
    sd = StableDiffusion(TINIEST).requires_grad_(False)
    pack(sd.unet)
    with pytest.raises(ValueError, match="packed weights cannot be compiled: load the model again"):
        generate(sd, "a", compile=True)
