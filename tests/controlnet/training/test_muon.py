"""Muon: orthogonal steps for hidden weights, AdamW for the rest."""

import pytest
import torch
from small import small_sd
from torch import nn

from controlnet.config import ControlConfig
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from controlnet.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_singular_values_come_near_one_and_the_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = u.T @ orthogonal(matrix[None])[0] @ vh.T  # diagonal if the directions are the matrix's
    assert (kept - kept.diag().diag()).abs().max() < 1e-4
    assert kept.diag().min() > 0.6 and kept.diag().max() < 1.3


def adamw_weights(module):
    """The matrices and kernels that Muon leaves to AdamW."""
    named = dict(module.named_parameters())
    muon = Muon(named.items(), 1e-3)
    assert all(p.ndim >= 2 for p in muon.hidden)
    return {name for name, p in named.items() if p.ndim >= 2 and p not in muon.hidden}


def test_what_reads_or_writes_data_is_adamws_and_every_other_weight_is_muons():
    sd = small_sd()
    loss = ControlLoss(sd.unet, ControlNet.from_unet(sd.unet), sd.schedule)
    lite = ControlNet.from_unet(sd.unet, ControlConfig(architecture="lite"))
    assert adamw_weights(loss) == {
        "control.encoder.blocks.0.conv.weight",
        "control.hint_encoder.convs.0.weight",
        "unet.encoder.blocks.0.conv.weight",
        "unet.decoder.conv_out.weight",
    }
    assert adamw_weights(lite) == {"encoder.blocks.0.weight", "hint_encoder.convs.0.weight"}
    assert adamw_weights(sd.text_encoder) == {"token_embedding.weight", "position_embedding.weight"}
    halves = [f"{half}.{end}.weight" for half in ("encoder", "decoder") for end in ("conv_in", "conv_out")]
    assert adamw_weights(sd.vae) == set(halves)


def test_a_step_makes_no_buffers_that_it_throws_away(monkeypatch):
    layer = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])
    muon, made, original = Muon(layer.named_parameters(), 1e-3), [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *args: made.append(args) or original(*args))
    for _ in range(3):
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        muon.step()
    assert len(made) == 1 + 2 * 3  # a mean for the matrix, mean and square for bias, norm's weight and its bias


def test_what_is_not_hidden_moves_as_torch_moves_it():
    torch.manual_seed(0)
    ours, theirs = nn.LayerNorm(6), nn.LayerNorm(6)
    muon = Muon(ours.named_parameters(), 1e-2)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(5):
        x = torch.randn(4, 6)
        for layer, optimizer in ((ours, muon), (theirs, adamw)):
            optimizer.zero_grad()
            layer(x).pow(3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_a_step_has_the_size_of_adamws_whatever_the_gradients():
    layers = nn.ModuleList([nn.Linear(32, 64, bias=False), nn.Conv2d(8, 16, 3, bias=False)])
    muon = Muon(layers.named_parameters(), 1e-2, weight_decay=0)
    for scale in (1e-4, 1e4):
        before = [p.detach().clone() for p in layers.parameters()]
        for parameter in layers.parameters():
            parameter.grad = scale * torch.randn_like(parameter)
        muon.state.clear()
        muon.step()
        for old, new in zip(before, layers.parameters(), strict=True):
            assert (new - old).pow(2).mean().sqrt().item() == pytest.approx(1e-2 * 0.2, rel=0.3)


def test_it_solves_a_linear_problem():
    torch.manual_seed(0)
    layer, x, truth = nn.Linear(8, 8, bias=False), torch.randn(64, 8), torch.randn(8, 8)
    muon = Muon(layer.named_parameters(), 0.05, weight_decay=0)
    losses = []
    for _ in range(200):
        loss = (layer(x) - x @ truth).pow(2).mean()
        muon.zero_grad()
        loss.backward()
        muon.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_a_state_from_a_file_goes_where_the_weights_are():
    """All of it: a GPU that reads a number of steps from the CPU's memory ends the program."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    saved = Muon(network.named_parameters(), 1e-3)
    network(torch.ones(1, 3)).sum().backward()
    saved.step()
    loaded = Muon(network.to("meta").named_parameters(), 1e-3)
    loaded.load_state_dict(saved.state_dict())
    assert {value.device.type for own in loaded.state.values() for value in own.values()} == {"meta"}
    assert any("step" in own for own in loaded.state.values())
