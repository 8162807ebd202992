"""The text encoder against the published models' numbers, and which of its layers run."""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from minis import relative
from reference import MINI_SD1, MINI_SD2, fill
from safetensors.torch import load_file

from ldm.config import TextConfig
from ldm.text_encoder import TextEncoder

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLIP, OPEN_CLIP = MINI_SD1.text, MINI_SD2.text
CLIP_NAMES = {
    "norm1": "layer_norm1",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.expand": "mlp.fc1",
    "mlp.contract": "mlp.fc2",
    "token_embedding": "embeddings.token_embedding",
    "position_embedding": "embeddings.position_embedding",
    "final_norm": "final_layer_norm",
}
OPEN_CLIP_NAMES = {
    "norm1": "ln_1",
    "attention.out": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.expand": "mlp.c_fc",
    "mlp.contract": "mlp.c_proj",
    "final_norm": "ln_final",
}


def clip_value(name, shape):
    """Our parameter's reference value, written out here by hand: it does not lean on `ldm.key_maps`."""
    module, kind = name.rsplit(".", 1)
    prefix = "cond_stage_model.transformer.text_model."
    if module.startswith("blocks."):
        _, i, module = module.split(".", 2)
        prefix += f"encoder.layers.{i}."
    return fill(f"{prefix}{CLIP_NAMES[module]}.{kind}", shape)


def open_clip_value(name, shape):
    prefix = "cond_stage_model.model."
    if name == "position_embedding.weight":
        return fill(f"{prefix}positional_embedding", shape)
    if name in ("text_projection", "logit_scale"):
        return fill(f"{prefix}{name}", shape)
    module, kind = name.rsplit(".", 1)
    if module.startswith("blocks."):
        _, i, module = module.split(".", 2)
        prefix += f"transformer.resblocks.{i}."
    if module in ("attention.q", "attention.k", "attention.v"):  # one tensor, q above k above v
        fused = fill(f"{prefix}attn.in_proj_{kind}", (3 * shape[0], *shape[1:]))
        return fused.chunk(3)["qkv".index(module[-1])]
    return fill(f"{prefix}{OPEN_CLIP_NAMES.get(module, module)}.{kind}", shape)


@pytest.fixture(scope="module", params=[CLIP, OPEN_CLIP], ids=lambda config: config.family)
def encoder(request):
    return filled(request.param)


def filled(config):
    encoder = TextEncoder(config)
    value = clip_value if config.family == "clip" else open_clip_value
    encoder.load_state_dict({name: value(name, tuple(p.shape)) for name, p in encoder.named_parameters()})
    return encoder


def test_clip_is_the_published_model():
    encoder, want = filled(CLIP), load_file(FIXTURES / "sd1_text.safetensors")
    with torch.no_grad():
        assert relative(encoder(want["ids"]), want["last_hidden_state"]) < 2e-5
        assert relative(encoder(want["ids"], clip_skip=2), want["clip_skip_2"]) < 2e-5
        assert relative(encoder(want["ids"], clip_skip=3), encoder.final_norm(want["hidden/1"])) < 2e-5


def test_open_clip_is_the_published_model():
    encoder, want = filled(OPEN_CLIP), load_file(FIXTURES / "sd2_text.safetensors")
    with torch.no_grad():
        assert relative(encoder(want["ids"]), want["penultimate"]) < 2e-5
        assert relative(encoder(want["ids"], clip_skip=2), encoder.final_norm(want["hidden/1"])) < 2e-5
        # The layer that never runs is the published one all the same.
        last = encoder.final_norm(encoder.blocks[2](want["hidden/2"]))
        assert relative(last, want["last"]) < 2e-5


@pytest.mark.parametrize("text", ["short", "long"])
def test_chunks_of_a_long_prompt_are_the_published_ones(text):
    encoder, want = filled(CLIP), load_file(FIXTURES / "sd1_longtext.safetensors")
    for clip_skip, key in ((1, "last"), (2, "clip_skip_2")):
        with torch.no_grad():
            context = encoder(want[f"{text}/ids"], clip_skip)  # (3, 77, D)
        context = rearrange(context, "chunks m d -> 1 (chunks m) d")
        assert relative(context, want[f"{text}/context_{key}"]) < 2e-5


@pytest.mark.parametrize("config, published", [(CLIP, 3), (OPEN_CLIP, 2)], ids=["clip", "open_clip"])
def test_layers_behind_the_one_that_is_read_do_not_run(config, published):
    encoder, ran = filled(config), []
    for i, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    for clip_skip in range(1, published + 1):
        ran.clear()
        encoder(torch.arange(6).view(2, 3), clip_skip)
        assert ran == list(range(published - clip_skip + 1))


def test_the_unused_parameters_of_open_clip_get_no_gradient():
    encoder = filled(OPEN_CLIP)
    encoder(torch.arange(6).view(2, 3)).square().sum().backward()
    unused = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    last = {f"blocks.2.{name}" for name, _ in encoder.blocks[2].named_parameters()}
    assert unused == last | {"text_projection", "logit_scale"}


def test_only_open_clip_stores_the_projection(encoder):
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters() if not name.startswith("blocks.")}
    width, extra = encoder.config.width, {"text_projection": (encoder.config.width,) * 2, "logit_scale": ()}
    norm = {"final_norm.weight": (width,), "final_norm.bias": (width,)}
    embeddings = {"token_embedding.weight": (49408, width), "position_embedding.weight": (77, width)}
    assert shapes == {**embeddings, **norm, **(extra if encoder.config.family == "open_clip" else {})}
    assert not list(encoder.buffers())


def test_a_token_sees_itself_and_what_stands_before_it(encoder):
    ids = torch.arange(100, 120).view(2, 10)
    changed = ids.clone()
    changed[0, 6] = 7
    with torch.no_grad():
        difference = (encoder(changed) - encoder(ids)).norm(dim=-1)
    assert (difference[0, :6] < 1e-5).all() and (difference[0, 6:] > 1e-3).all() and (difference[1] < 1e-5).all()


def test_a_shorter_row_is_the_beginning_of_a_longer_one(encoder):
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert relative(encoder(ids[:, :9]), encoder(ids)[:, :9]) < 2e-5


def test_gelu_of_each_family():
    x = torch.tensor([1.0])
    quick, exact = (TextEncoder(config).blocks[0].mlp.activation(x) for config in (CLIP, OPEN_CLIP))
    assert quick.item() == pytest.approx(0.845796, abs=1e-6)
    assert exact.item() == pytest.approx(0.841345, abs=1e-6)


@pytest.mark.parametrize("clip_skip", [0, -1, 4])
def test_a_layer_that_does_not_exist_is_refused(encoder, clip_skip):
    with pytest.raises(ValueError, match=f"clip_skip is {clip_skip}"):
        encoder(torch.zeros(1, 5, dtype=torch.long), clip_skip)


def test_the_layer_before_the_first_of_open_clip_is_refused():
    with pytest.raises(ValueError, match="accepts 1 to 2"):
        filled(OPEN_CLIP)(torch.zeros(1, 5, dtype=torch.long), 3)


def test_too_many_tokens_are_refused(encoder):
    with pytest.raises(ValueError, match="78 tokens"):
        encoder(torch.zeros(1, 78, dtype=torch.long))


def test_a_fresh_encoder_starts_as_clip_did():
    encoder = TextEncoder(TextConfig(width=64, heads=4, layers=2, vocabulary=2048))
    assert encoder.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert encoder.position_embedding.weight.std().item() == pytest.approx(0.01, rel=0.05)
