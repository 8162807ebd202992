"""The UNet against the published code's numbers, whole and block by block, and what it computes in which way."""

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from minis import MINIS, every_fourth, inputs, mini_control, mini_unet, relative, stored
from small import SMALL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import ldm.unet
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from ldm.attention import Attention
from ldm.blocks import Downsample, TimeEmbedding, sinusoidal_embedding
from ldm.config import SD15
from ldm.schedule import Schedule
from ldm.unet import ConvBlock, ResTransformerBlock, UNet, UNetEncoder, set_checkpointing

TOLERANCE = 2e-5


# ----------------------------------------------------------------------------------------------------------- numbers


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_the_output_is_the_published_one(style):
    x, t, context, _ = inputs(style)
    assert relative(mini_unet(style)(x, t, context), stored("unet")[f"{style}/eps_nocontrol"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_a_context_may_have_any_number_of_tokens(style):
    x, t, context, _ = inputs(style)
    twice = torch.cat([context, stored("inputs")[f"{style}/uncond"]], dim=1)
    assert twice.shape[1] == 154
    assert relative(mini_unet(style)(x, t, twice), stored("unet")[f"{style}/eps_context_154"]) < TOLERANCE


def outputs_of(modules, run):
    """What each of the named modules gives while `run()` is running."""
    found = {}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: found.update({name: output}))
        for name, module in modules.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def blocks_by_published_name(unet):
    modules = {f"input_blocks.{i:02d}": block for i, block in enumerate(unet.encoder.blocks)}
    modules["middle_block"] = unet.encoder.middle
    modules |= {f"output_blocks.{i:02d}": block for i, block in enumerate(unet.decoder.blocks)}
    first = unet.encoder.blocks[1]
    modules["input_blocks.01.resblock"] = first.res
    modules["input_blocks.01.spatial_transformer"] = first.transformer
    modules["input_blocks.01.spatial_transformer.norm"] = first.transformer.norm
    modules["input_blocks.01.spatial_transformer.attn1"] = first.transformer.block.self_attention
    modules["input_blocks.01.spatial_transformer.attn2"] = first.transformer.block.cross_attention
    modules["input_blocks.01.spatial_transformer.ff"] = first.transformer.block.feed_forward
    return modules


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_every_block_gives_the_published_features(style):
    unet, (x, t, context, hint) = mini_unet(style), inputs(style)
    control = mini_control(style)(x, t, context, hint)
    modules = blocks_by_published_name(unet)
    found = outputs_of(modules, lambda: unet(x, t, context, control))
    want = stored("unet")
    assert len(found) == 12 + 1 + 12 + 6
    for name, features in found.items():
        assert relative(every_fourth(features), want[f"{style}/{name}"]) < TOLERANCE, name


# The blocks one by one on inputs of size 0.01, where a norm's epsilon counts: in a whole pass it is lost in rounding.
# Published name -> ours, and what the block takes beside its input.
PROBES = {
    "input_blocks.3.0": ("encoder.blocks.3.conv", None),
    "input_blocks.4.0": ("encoder.blocks.4.res", "emb"),
    "input_blocks.4.1": ("encoder.blocks.4.transformer", "context"),
    "input_blocks.4.1.transformer_blocks.0": ("encoder.blocks.4.transformer.block", "context"),
    "input_blocks.5.0": ("encoder.blocks.5.res", "emb"),
    "middle_block.1": ("encoder.middle.transformer", "context"),
    "output_blocks.2.1": ("decoder.blocks.2.upsample", None),
}


def probe_arguments(style):
    """Of the first picture, for a block that takes the time embedding or the context, or nothing more."""
    return {"emb": [stored("probes")["emb"]], "context": [stored("inputs")[f"{style}/context"][:1]], None: []}


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
@pytest.mark.parametrize("theirs", PROBES)
def test_a_block_alone_is_the_published_one(style, theirs):
    g, (ours, argument) = stored("probes"), PROBES[theirs]
    block = mini_unet(style).get_submodule(ours)
    output = block(g[f"model.diffusion_model.{theirs}/in"], *probe_arguments(style)[argument])
    assert relative(output, g[f"{style}/model.diffusion_model.{theirs}/out"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("style", MINIS)
def test_the_last_layers_alone_are_the_published_ones(style):
    g = stored("probes")
    decoder = copy.deepcopy(mini_unet(style).decoder)
    decoder.blocks = nn.ModuleList()  # without them it is its last norm, activation and convolution
    output = decoder(g["model.diffusion_model.out/in"], [], None, None)
    assert relative(output, g[f"{style}/model.diffusion_model.out/out"]) < 1e-5


def test_timesteps_are_embedded_as_published():
    """Cosines before sines; fractions and odd widths too."""
    g = stored("unet")
    for width in (32, 33, 320):
        assert relative(sinusoidal_embedding(g["t"], width), g[f"emb_dim{width}"]) < 1e-5
    assert relative(sinusoidal_embedding(g["t_frac"], 320), g["emb_frac_dim320"]) < 1e-5
    with torch.no_grad():
        time = mini_unet("sd1").encoder.time_embedding(g["t"])
    assert relative(time, g["sd1_mini_time_embed"]) < 1e-5


@pytest.mark.parametrize("t", [500, torch.tensor(500), [500]])
def test_timesteps_are_a_tensor_of_one_for_each_x(t):
    with pytest.raises(TypeError, match=r"^t is .*, expected timesteps \(B,\), as in torch.tensor\(\[500\]\)"):
        TimeEmbedding(32, 64)(t)


# ------------------------------------------------------------------------------------------------------ architecture

ROW = re.compile(r"^ +(\d+|middle)  +(.+?),? +(\d+), +(\d+), +(\d+)$", re.MULTILINE)


def contents(block):
    """A block in the words of the table."""
    if isinstance(block, ResTransformerBlock):
        return "ResBlock" if block.transformer is None else "ResBlock, transformer"
    assert isinstance(block, ConvBlock)
    return "downsample" if isinstance(block.conv, Downsample) else "convolution"


def test_the_table_of_blocks_in_the_docstring_is_true():
    rows = ROW.findall(ldm.unet.__doc__)
    words, shapes = [row[1] for row in rows], [tuple(map(int, row[2:])) for row in rows]
    assert [row[0] for row in rows] == [*map(str, range(12)), "middle"]
    with torch.device("meta"):
        encoder = UNetEncoder(SD15.unet)
        encoded = encoder(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
        control = ControlNet(UNet(SD15.unet))
    assert shapes == [tuple(features.shape[1:]) for features in (*encoded.skips, encoded.middle)]
    assert words == [*map(contents, encoder.blocks), "ResBlock, transformer"]
    assert re.search(r"^ +middle .*\n +ResBlock$", ldm.unet.__doc__, re.MULTILINE)
    assert [conv.out_channels for conv in control.zero_convs] == [channels for channels, _, _ in shapes[:-1]]


# ----------------------------------------------------------------------------------------------------- checkpointing


def runs_of_blocks(*stacks):
    """A list that grows by one with each call of one of the blocks."""
    runs = []
    for stack in stacks:
        for block in stack.blocks:
            block.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def loss_and_gradients(model, compute_loss):
    model.zero_grad()
    loss = compute_loss()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_bit_equal(got, want):
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    assert all(torch.equal(gradient, want[1][name]) for name, gradient in got[1].items())


def small_batch():
    generator = torch.Generator().manual_seed(2)
    randn = partial(torch.randn, generator=generator)
    return randn(2, 4, 8, 8), torch.tensor([17, 800]), randn(2, 5, SMALL.unet.context_width), randn(2, 3, 64, 64)


def test_checkpointing_runs_the_blocks_of_a_unet_again_and_changes_no_bit():
    torch.manual_seed(0)
    unet = UNet(SMALL.unet)
    blocks = len(unet.encoder.blocks) + len(unet.decoder.blocks)
    x, t, context, _ = small_batch()
    runs = runs_of_blocks(unet.encoder, unet.decoder)

    plain = loss_and_gradients(unet, lambda: unet(x, t, context).square().mean())
    assert len(runs) == blocks
    set_checkpointing(unet, True)
    runs.clear()
    checkpointed = loss_and_gradients(unet, lambda: unet(x, t, context).square().mean())
    assert len(runs) == 2 * blocks
    assert_bit_equal(checkpointed, plain)

    runs.clear()
    with torch.no_grad():
        unet(x, t, context)
    set_checkpointing(unet, False)
    unet(x, t, context)
    assert len(runs) == 2 * blocks  # once each time


def test_checkpointing_runs_the_blocks_of_a_control_again_and_changes_no_bit():
    torch.manual_seed(0)
    unet = UNet(SMALL.unet).requires_grad_(False)
    control = ControlNet.from_unet(unet)
    for conv in control.zero_convs:
        nn.init.normal_(conv.weight, std=0.1)
    x, t, context, hint = small_batch()
    noise = x.flip(0)
    locked, trained, hints = runs_of_blocks(unet.encoder), runs_of_blocks(control.encoder, unet.decoder), []
    control.hint_encoder.convs[0].register_forward_pre_hook(lambda *_: hints.append(1))

    def loss():
        return ControlLoss(unet, control, Schedule(SMALL.schedule))(x, noise, t, context, hint)

    plain = loss_and_gradients(control, loss)
    set_checkpointing(unet, True)
    set_checkpointing(control, True)
    for runs in (locked, trained, hints):
        runs.clear()
    checkpointed = loss_and_gradients(control, loss)
    assert_bit_equal(checkpointed, plain)
    assert all(gradient.norm() > 0 for name, gradient in plain[1].items() if name.startswith("encoder.blocks"))
    assert len(trained) == 2 * (len(control.encoder.blocks) + len(unet.decoder.blocks))
    assert len(hints) == 2
    assert len(locked) == len(unet.encoder.blocks)  # nothing is trained there: no second run


# --------------------------------------------------------------------------------------------------------- precision


def attention_with_huge_logits(fp32_logits):
    """Each logit is a product of q and k of about 1000 in 32 channels: far from fp16's largest number, 65504."""
    torch.manual_seed(0)
    attention = Attention(32, 32, heads=1, fp32_logits=fp32_logits)
    for layer in (attention.q, attention.k):
        nn.init.normal_(layer.weight, std=200)
    return attention.requires_grad_(False)


def relative_to_fp64(output, attention, x):
    return relative(output, copy.deepcopy(attention).double()(x.double(), x.double()))


KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # those of CPUs


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fp32_logits", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype, rounding", [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_half_precision_has_fp32_logits_in_every_kernel(dtype, rounding, autocast, fp32_logits, kernel):
    """Also where q, k and v stay in half precision, which the fused kernels need."""
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    attention = attention_with_huge_logits(fp32_logits).to(dtype)
    logits = attention.q(x).float() @ attention.k(x).float().mT
    assert 65504 < logits.abs().max() < float("inf")
    stored = copy.deepcopy(attention).float() if autocast else attention
    with sdpa_kernel(kernel), torch.autocast("cpu", dtype, enabled=autocast):
        output = stored(x, x)
    assert output.dtype == dtype and relative_to_fp64(output, attention, x) < rounding


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
@pytest.mark.parametrize("fp32_logits", [True, False])
def test_only_cudas_kernels_are_left_to_sum_up_logits(device, fp32_logits, monkeypatch):
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.extend([q.dtype, k.dtype]) or v)
    with FakeTensorMode():
        q = torch.empty(1, 1, 6, 32, dtype=torch.float16, device=device)
    assert Attention(32, 32, heads=1, fp32_logits=fp32_logits).attend(q, q, q).dtype == torch.float16
    assert seen == [torch.float32 if fp32_logits and device != "cuda" else torch.float16] * 2


@torch.no_grad()
@pytest.mark.parametrize("style, dtype, rounding", [("sd1", torch.float16, 4e-3), ("sd2", torch.bfloat16, 3.5e-2)])
def test_half_precision_is_near_the_published_output(style, dtype, rounding):
    """Found: 2.3e-3 in fp16, 1.9e-2 in bf16."""
    x, t, context, _ = inputs(style)
    output = copy.deepcopy(mini_unet(style)).to(dtype)(x.to(dtype), t, context.to(dtype))
    assert relative(output, stored("unet")[f"{style}/eps_nocontrol"]) < rounding


def test_every_attention_of_sd2_has_fp32_logits_and_none_of_sd1():
    for style, wanted in (("sd1", False), ("sd2", True)):
        for part in (mini_unet(style), mini_control(style)):
            attentions = [module for module in part.modules() if isinstance(module, Attention)]
            assert {module.fp32_logits for module in attentions} == {wanted}
