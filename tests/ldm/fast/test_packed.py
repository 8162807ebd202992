"""Packed weights: the same numbers, and no way to lose the weights by them."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SMALLEST, small_control, small_sd
from torch import nn

from controlnet import ControlNet
from controlnet.guidance import Control, guided
from ldm.blocks import Upsample
from ldm.fast.packed import Packed, PackedUpsample, pack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch comes without oneDNN")


def plain_layers(*networks):
    """Those that compute, which are all but what packed layers keep to be saved."""
    children = [child for network in networks for child in network.children() if not isinstance(network, Packed)]
    return [n for n in networks if isinstance(n, nn.Conv2d | nn.Linear)] + (plain_layers(*children) if children else [])


@torch.no_grad()
def test_a_guided_step_and_the_autoencoder_give_the_same():
    """Also for images of other shapes than the first, for which the weights were packed."""
    sd, other = small_sd(SMALLEST), small_sd(SMALLEST)
    net, other_net = small_control(sd), small_control(other)
    pack(other.unet, other.vae, other_net)
    assert not plain_layers(other.unet, other.vae, other_net)
    for count, height, width in [(1, 8, 8), (3, 8, 16), (1, 16, 8)]:
        x, hint = torch.randn(count, 4, height, width), torch.rand(1, 3, 8 * height, 8 * width)
        t, (prompt, negative) = torch.full((count,), 500), torch.randn(2, count, 77, 16)
        plain = guided(sd.unet, prompt, negative, 3.0, [Control(net, hint)])(x, t)
        packed = guided(other.unet, prompt, negative, 3.0, [Control(other_net, hint)])(x, t)
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4 * plain.std().item())
        images = 2 * torch.rand(count, 3, 8 * height, 8 * width) - 1
        torch.testing.assert_close(
            other.encode(images, sample=False), sd.encode(images, sample=False), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(other.decode(x), sd.decode(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_strides_paddings_and_layers_without_a_bias():
    for layer, shape in [
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 7)),
        (nn.Conv2d(4, 4, 3, stride=2), (1, 4, 9, 9)),
        (nn.Conv2d(4, 8, 1), (2, 4, 3, 3)),
        (nn.Linear(6, 4, bias=False), (2, 5, 6)),
        (nn.Linear(6, 4), (2, 6)),
    ]:
        network = nn.Sequential(layer)
        x = torch.randn(shape)
        plain = network(x)
        pack(network)
        assert isinstance(network[0], Packed)
        torch.testing.assert_close(network(x), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_upsampling_without_doubling_the_map_is_the_same():
    """At every position: the edges, where padding takes part, are where another folding would show."""
    torch.manual_seed(0)
    upsample = Upsample(6)
    network = nn.Sequential(upsample)
    pack(network)
    assert isinstance(network[0], PackedUpsample)
    for shape in [(1, 6, 1, 1), (1, 6, 4, 4), (3, 6, 5, 2), (2, 6, 1, 7)]:
        x = torch.randn(shape)
        torch.testing.assert_close(network(x), upsample(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_is_packed_is_saved_as_it_was(tmp_path):
    """To the bit, before its weights are brought into blocks and after."""
    sd = small_sd(SMALLEST)
    sd.save(tmp_path / "plain.safetensors")
    pack(sd)
    sd.save(tmp_path / "unused.safetensors")
    sd.unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), sd.encode_text(["a", "b"]))
    sd.decode(sd.encode(torch.rand(1, 3, 64, 64)))
    sd.save(tmp_path / "used.safetensors")
    plain, *packed = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "unused", "used"))
    for saved in packed:
        assert saved.keys() == plain.keys()
        assert all(torch.equal(saved[key], plain[key]) for key in plain)


def test_what_is_packed_can_be_neither_moved_nor_converted():
    for layer in (nn.Linear(4, 4), nn.Conv2d(4, 4, 3), Upsample(4)):
        network = nn.Sequential(layer)
        pack(network)
        network.cpu().float()
        with pytest.raises(ValueError, match="copy before you pack"):
            copy.deepcopy(network)
        for change in (lambda n=network: n.half(), lambda n=network: n.to("meta")):
            with pytest.raises(ValueError, match="neither leave the CPU nor change their dtype"):
                change()


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3), Upsample(4)], ids=lambda layer: type(layer).__name__
)
def test_what_is_packed_refuses_an_input_that_wants_gradients(layer):
    network = nn.Sequential(layer)
    pack(network)
    x = torch.ones(1, 4, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="packed weights pass on no gradients"):
        network(x)
    with torch.no_grad():
        network(x)


def test_other_types_and_devices_are_left_alone():
    network = nn.Sequential(nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(4, 4, device="meta"))
    pack(network)
    assert [type(layer) for layer in network] == [nn.Linear, nn.Linear]


def test_a_packed_base_still_takes_a_control_that_carries_its_base(tmp_path):
    """Its decoder is compared with the one in the file."""
    sd = small_sd(SMALLEST)
    small_control(sd).save(tmp_path / "control.safetensors")
    sd.save(tmp_path / "base.safetensors")
    whole = load_file(tmp_path / "base.safetensors") | load_file(tmp_path / "control.safetensors")
    save_file(whole, tmp_path / "whole.safetensors")
    pack(sd.unet)
    ControlNet.load(tmp_path / "whole.safetensors", sd.unet)


@torch.no_grad()
def test_the_norm_of_a_large_map_is_as_exact_as_that_of_a_small_one():
    """Also where the map is flat. PyTorch's own norm is wrong by 1e-5 here, which is why there is another."""
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    norm.weight.normal_(), norm.bias.normal_()
    x = 2 * torch.randn(2, 16, 480, 512) + 3 * torch.randn(2, 16, 480, 1) + torch.randn(16, 1, 1)
    x[0, :, 128:256] = 5
    want = nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    network = nn.Sequential(norm)
    pack(network)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        got = network(x.contiguous(memory_format=memory_format))
        assert (got - want).norm() < 1e-6 * want.norm()
