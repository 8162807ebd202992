"""Matrix products by oneDNN are those of PyTorch, with their gradients, and only where these are slow."""

import pytest
import torch
import torch.nn.functional as F
from small import SMALLEST, small_control, small_sd
from torch import nn

import ldm.fast.onednn
import ldm.fast.packed
from controlnet.objective import ControlLoss
from ldm.attention import Attention
from ldm.fast.onednn import MIN_ROWS, MIN_TOKENS, Linear, LinearFunction, attend, mkl_is_slow, use_onednn_linear
from ldm.fast.packed import pack
from ldm.schedule import Schedule
from ldm.vae import AttentionBlock

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch comes without oneDNN")


@pytest.fixture
def slow(monkeypatch):
    """As on a processor on which MKL is slow, whichever this is."""
    for module in (ldm.fast.onednn, ldm.fast.packed):
        monkeypatch.setattr(module, "mkl_is_slow", lambda: True)


def output_and_gradients(linear, tensors, weigh):
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    y = linear(*tensors)
    return [y, *torch.autograd.grad((y * weigh).sum(), wanted)]


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradients_of_a_product_are_those_of_a_linear_layer(shape, locked, bias):
    """Of input, weight and bias; of the input alone where the others are locked."""
    torch.manual_seed(0)
    x = torch.randn(shape).requires_grad_()
    weight, vector = torch.randn(3, 5).requires_grad_(not locked), torch.randn(3).requires_grad_(not locked)
    tensors = [x, weight, vector if bias else None]
    weigh = torch.randn(*shape[:-1], 3)
    got, want = (output_and_gradients(linear, tensors, weigh) for linear in (LinearFunction.apply, F.linear))
    assert len(got) == len(want) == 2 + (not locked) * (1 + bias)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_map_may_come_in_and_its_gradient_back_in_any_order_of_memory():
    """As a projection of SD 2.x gets it: tokens that are positions of a map. Gradients may be one number for all."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 16, 16).requires_grad_(), torch.randn(3, 5).requires_grad_()
    results = []
    for linear in (LinearFunction.apply, F.linear):
        y = linear(x.flatten(2).mT, weight, None).mT.unflatten(2, (16, 16))
        results.append((y, *torch.autograd.grad(y.sum() + (y[:, :, ::2] ** 2).sum(), (x, weight))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_attention_of_many_tokens_is_the_same(monkeypatch):
    """Of several samples and heads, their logits in pieces of which the last is shorter."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 3, 8).transpose(1, 2) for tokens in (MIN_TOKENS + 100, MIN_TOKENS, MIN_TOKENS))
    want = F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # which must not be what answers
    torch.testing.assert_close(attend(q, k, v), want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_packed_networks_attend_so(slow):
    """And give the same, in the UNet and in the autoencoder."""
    torch.manual_seed(0)
    x, tokens = torch.randn(1, 8, 32, 32), torch.randn(1, 32 * 32, 8)
    for network, inputs in ((AttentionBlock(8, groups=2), (x,)), (Attention(8, 8, heads=2), (tokens, tokens))):
        want = network(*inputs)
        pack(network)
        assert network.attend is attend
        torch.testing.assert_close(network(*inputs), want, rtol=1e-4, atol=1e-5)


def test_a_control_trains_the_same(slow):
    """Its loss and its gradients, through a locked decoder and through checkpoints' second pass; it keeps its
    parameters, and their names."""
    results = []
    for quick in (False, True):
        sd = small_sd(SMALLEST).requires_grad_(False)
        net = small_control(sd).requires_grad_(True)
        before = dict(net.named_parameters())
        if quick:
            use_onednn_linear(sd.unet.decoder, net)
            assert any(isinstance(layer, Linear) for layer in net.modules())
            assert not any(type(layer) is nn.Linear for layer in (*net.modules(), *sd.unet.decoder.modules()))
        assert all(before.pop(name) is parameter for name, parameter in net.named_parameters()) and not before
        generator = torch.Generator().manual_seed(0)
        z0, noise = torch.randn(2, 4, 4, 8, 16, generator=generator)
        context, hint = torch.randn(4, 77, 16, generator=generator), torch.rand(4, 3, 64, 128, generator=generator)
        t = torch.tensor([1, 300, 600, 999])
        loss = ControlLoss(sd.unet, net, Schedule(SMALLEST.schedule))(z0, noise, t, context, hint)
        loss.backward()
        results.append({"loss": loss.detach(), **{name: p.grad for name, p in net.named_parameters()}})
    for name, want in results[0].items():
        assert (results[1][name] - want).norm() <= 1e-4 * want.norm() + 1e-7, name


def test_few_rows_and_autocast_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(LinearFunction, "apply", None)
    linear = Linear(4, 4)
    assert linear(torch.randn(MIN_ROWS - 1, 4)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(MIN_ROWS, 4)).dtype == torch.bfloat16


def test_nothing_is_exchanged_where_mkl_is_fast(monkeypatch):
    for module in (ldm.fast.onednn, ldm.fast.packed):
        monkeypatch.setattr(module, "mkl_is_slow", lambda: False)
    network = nn.Sequential(nn.Linear(4, 4), AttentionBlock(4, groups=1))
    use_onednn_linear(network)
    assert type(network[0]) is nn.Linear
    pack(network)
    assert network[1].attend.__func__ is AttentionBlock.attend


@pytest.mark.parametrize(
    ("processor", "vectors", "is_slow"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_mkl_is_slow_where_it_leaves_half_of_the_vectors_unused(monkeypatch, tmp_path, processor, vectors, is_slow):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {processor}\n")
    monkeypatch.setattr(ldm.fast.onednn, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert mkl_is_slow.__wrapped__() is is_slow
