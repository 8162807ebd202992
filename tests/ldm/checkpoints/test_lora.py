"""LoRAs: one random LoRA in every spelling gives the same weights, other kinds follow their formulas, and what does not
fit is refused whole."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import save_file
from small import assert_same, error_of

from ldm.checkpoints.lora import check_loras, merge_loras, read_loras
from ldm.config import TextConfig
from ldm.text_encoder import TextEncoder
from ldm.unet import UNet

TWO_LEVELS = {"multipliers": (1, 2), "attention": (False, True), "heads": (2, 2)}
SMALL = replace(small.SMALL, unet=replace(small.SMALL.unet, **TWO_LEVELS))
SMALL_SD2 = replace(
    SMALL,
    unet=replace(SMALL.unet, linear_projections=True),
    text=TextConfig("open_clip", width=16, heads=2, layers=2, vocabulary=600),
)
ATTENTION = "transformer_blocks.0.attn1"
# Their name in diffusers' layout and in the original one, and ours: written out, not taken from the tables.
UNET = {
    f"down_blocks.1.attentions.0.{ATTENTION}.to_q": (
        f"input_blocks.3.1.{ATTENTION}.to_q",
        "encoder.blocks.3.transformer.block.self_attention.q",
    ),
    f"up_blocks.0.attentions.1.{ATTENTION}.to_out.0": (
        f"output_blocks.1.1.{ATTENTION}.to_out.0",
        "decoder.blocks.1.transformer.block.self_attention.out",
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (
        "middle_block.1.transformer_blocks.0.attn2.to_v",
        "encoder.middle.transformer.block.cross_attention.v",
    ),
}
MORE_UNET = {  # of which diffusers' first spelling has none
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj",
        "encoder.middle.transformer.block.feed_forward.expand",
    ),
    "mid_block.attentions.0.proj_in": ("middle_block.1.proj_in", "encoder.middle.transformer.proj_in"),  # 1x1
    "down_blocks.1.resnets.0.conv1": ("input_blocks.3.0.in_layers.2", "encoder.blocks.3.res.conv1"),  # 3x3
    "down_blocks.0.downsamplers.0.conv": ("input_blocks.2.0.op", "encoder.blocks.2.conv.conv"),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": "blocks.0.attention.q",
    "text_model.encoder.layers.0.self_attn.out_proj": "blocks.0.attention.out",
}
MLP = {"text_model.encoder.layers.0.mlp.fc1": "blocks.0.mlp.expand"}
OURS = {name: ours for name, (_, ours) in (UNET | MORE_UNET).items()} | TEXT | MLP
RANK = 3


@cache
def fresh(config):
    """Always the same weights: not to be changed."""
    torch.manual_seed(0)
    return UNet(config.unet).requires_grad_(False), TextEncoder(config.text).requires_grad_(False)


def networks(config=SMALL):
    return deepcopy(fresh(config))


def weight_of(nets, name):
    return nets[name in TEXT | MLP].get_submodule(OURS[name]).weight


def random_factors(nets, names, seed=1):
    """down (r, I, ...) and up (O, r, ...) for each, in the shapes that trainers write."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in names:
        o, i, *kernel = weight_of(nets, name).shape
        down = torch.randn(RANK, i, *kernel, generator=generator)
        factors[name] = down, torch.randn(o, RANK, *[1] * len(kernel), generator=generator)
    return factors


def under(front, name):
    return front + name.replace(".", "_")


def kohya(name):
    return under("lora_te_" if name in TEXT | MLP else "lora_unet_", name)


def kohya_original(name):
    return under("lora_unet_", (UNET | MORE_UNET)[name][0]) if name in UNET | MORE_UNET else kohya(name)


def dotted(name):
    return f"text_encoder.{name}" if name in TEXT | MLP else f"unet.{name}"


def without_a_level(name):
    """Transformers 5 has no text_model."""
    return dotted(name).replace("text_encoder.text_model.", "text_encoder.")


def processor(name):
    """Diffusers' first: a LoRA was part of the attention processor."""
    if name in TEXT:
        start, last = name.rsplit(".", 1)
        return f"text_encoder.{start}.to_{last.removesuffix('_proj')}_lora"
    start, last = name.removesuffix(".0").rsplit(".", 1)
    return f"{start}.processor.{last}_lora"


SPELLINGS = {  # the name of a module, and the ends of its two factors
    "kohya": (kohya, ".lora_down.weight", ".lora_up.weight"),
    "kohya, original layout": (kohya_original, ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (dotted, ".lora.down.weight", ".lora.up.weight"),
    "diffusers' text encoder": (dotted, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "diffusers with PEFT": (dotted, ".lora_A.weight", ".lora_B.weight"),
    "PEFT": (lambda name: f"base_model.model.{name}", ".lora_A.weight", ".lora_B.weight"),
    "PEFT, named": (lambda name: f"base_model.model.{name}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "transformers 5": (without_a_level, ".lora_A.weight", ".lora_B.weight"),
    "processors": (processor, ".down.weight", ".up.weight"),
}


def written(path, factors, spelling="kohya", alpha=None, **metadata):
    name_of, down_end, up_end = SPELLINGS[spelling]
    tensors = {}
    for name, (down, up) in factors.items():
        spelled = name_of(name)
        tensors |= {spelled + down_end: down, spelled + up_end: up}
        if alpha is not None:
            tensors[f"{spelled}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def merged(nets, *names):
    merge_loras(read_loras([str(name) for name in names], *nets))
    return nets


def assert_weights(nets, before, changes):
    """`before` plus `changes` (by their name), and nothing else changed."""
    wanted = {id(weight_of(nets, name)): change for name, change in changes.items()}
    for net, old in zip(nets, before, strict=True):
        for own, was in zip(net.parameters(), old.parameters(), strict=True):
            if id(own) in wanted:
                torch.testing.assert_close(own, was + wanted.pop(id(own)).view_as(was))
            else:
                assert torch.equal(own, was)
    assert not wanted


def by_hand(down, up, scale):
    """Each entry as a sum over the rank."""
    down, up = down.double().flatten(1), up.double().flatten(1)
    return scale * sum(torch.outer(up[:, r], down[r]) for r in range(RANK)).float()


# ------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("config", [SMALL, SMALL_SD2], ids=["sd1", "sd2"])
def test_one_lora_in_every_spelling_gives_the_same_weights(tmp_path, spelling, config):
    nets = networks(config)
    names = {**UNET, **TEXT} if spelling == "processors" else OURS
    factors = random_factors(nets, names)
    alpha = None if spelling == "processors" else 1.5
    file = written(tmp_path / "a.safetensors", factors, spelling, alpha)
    scale = 0.8 * (alpha / RANK if alpha else 1)  # without alpha it is as large as the rank
    want = {name: by_hand(*pair, scale) for name, pair in factors.items()}
    assert_weights(merged(nets, f"{file}:0.8"), fresh(config), want)


def test_alpha_of_diffusers_is_in_the_metadata_and_of_peft_in_a_file_beside(tmp_path):
    names = list(UNET)
    described = {"lora_alpha": 6, "r": RANK, "alpha_pattern": {names[0].removeprefix("down_blocks.1."): 12}}
    want = {name: 4.0 if name == names[0] else 2.0 for name in names}
    nets = networks()
    factors = random_factors(nets, names)
    want = {name: by_hand(*factors[name], scale) for name, scale in want.items()}
    metadata = json.dumps({f"unet.{key}": value for key, value in described.items()})
    file = written(tmp_path / "a.safetensors", factors, "diffusers with PEFT", lora_adapter_metadata=metadata)
    assert_weights(merged(nets, file), fresh(SMALL), want)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(described))
    file = written(tmp_path / "peft" / "adapter_model.safetensors", factors, "PEFT")
    assert_weights(merged(networks(), file), fresh(SMALL), want)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(described | {"use_rslora": True}))
    assert "asks for rslora" in error_of(read_loras, [str(file)], *nets)


# ----------------------------------------------------------------------------------------------------------- kinds


def test_kinds_of_lycoris_and_dora_follow_their_formulas(tmp_path):
    nets = fresh(SMALL)
    linear, conv = list(UNET)[0], "down_blocks.1.resnets.0.conv1"
    g = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    (o, i), (oc, ic, _, _) = weight_of(nets, linear).shape, weight_of(nets, conv).shape
    w = {name: weight_of(nets, name).clone() for name in (linear, conv)}

    def check(name, factors, want, alpha=1.5):
        tensors = {f"{kohya(name)}.{key}": value for key, value in factors.items()}
        save_file(tensors | {f"{kohya(name)}.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
        assert_weights(merged(networks(), tmp_path / "a.safetensors"), nets, {name: want})

    half = {"hada_w1_a": random(o, 3), "hada_w1_b": random(3, i), "hada_w2_a": random(o, 3), "hada_w2_b": random(3, i)}
    a, b, c, d = half.values()
    check(linear, half, 0.5 * (a @ b) * (c @ d))

    # Tucker's cores as LyCORIS rebuilds them: i j k l, j r, i p -> p r k l.
    a, b, c, d = random(3, oc), random(3, ic), random(3, oc), random(3, ic)
    t, u = random(3, 3, 3, 3), random(3, 3, 3, 3)
    factors = dict(hada_w1_a=a, hada_w1_b=b, hada_w2_a=c, hada_w2_b=d, hada_t1=t, hada_t2=u)
    rebuilt = [torch.einsum("ijkl, jr, ip -> prkl", core, y, x) for core, x, y in ((t, a, b), (u, c, d))]
    check(conv, factors, 0.5 * rebuilt[0] * rebuilt[1])

    down, mid, up = random(3, ic, 1, 1), random(3, 3, 3, 3), random(oc, 3, 1, 1)
    want = torch.einsum("ijkl, jr, pi -> prkl", mid, down[:, :, 0, 0], up[:, :, 0, 0])
    check(conv, {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, 0.5 * want)

    w1, w2 = random(4, 2), random(oc // 4, ic // 2, 3, 3)
    want = torch.cat([torch.cat([x * w2 for x in row], dim=1) for row in w1])
    check(conv, {"lokr_w1": w1, "lokr_w2": w2}, want)  # neither is a product: alpha does not count
    w2a, w2b = random(oc // 4, 3), random(3, ic // 2 * 9)
    want = torch.cat([torch.cat([x * (w2a @ w2b).view(-1, ic // 2, 3, 3) for x in row], dim=1) for row in w1])
    check(conv, {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b}, 0.5 * want)

    down, up = random(3, i), random(o, 3)
    together, lengths = w[linear] + 0.5 * up @ down, random(o, 1).abs()
    by_row = lengths * together / together.pow(2).sum(dim=1, keepdim=True).sqrt() - w[linear]
    plain = {"lora_down.weight": down, "lora_up.weight": up}
    check(linear, plain | {"dora_scale": lengths}, by_row)
    check(linear, plain | {"lora_magnitude_vector": lengths[:, 0].contiguous()}, by_row)
    by_column = lengths.T * together / together.pow(2).sum(dim=0, keepdim=True).sqrt() - w[linear]
    check(linear, plain | {"dora_scale": lengths.T.contiguous()}, by_column)  # o == i


# ------------------------------------------------------------------------------------------------ several, and types


def test_several_add_up_in_any_order_and_a_negative_one_takes_back(tmp_path):
    nets = fresh(SMALL)
    files = [written(tmp_path / f"{i}.safetensors", random_factors(nets, OURS, seed=i)) for i in range(3)]
    names = [f"{files[0]}:0.3", f"{files[1]}:-0.7", f"{files[2]}"]
    one, other = merged(networks(), *names), merged(networks(), *reversed(names))
    want = {}
    for i, strength in enumerate((0.3, -0.7, 1)):
        for name, pair in random_factors(nets, OURS, seed=i).items():
            want[name] = want.get(name, 0) + by_hand(*pair, strength)
    assert_weights(one, nets, want)
    for net, same in zip(one, other, strict=True):
        assert_same(net, same)
    nothing = merged(networks(), f"{files[0]}:0", f"{files[1]}:2", f"{files[1]}:-2")
    assert_weights(nothing, nets, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(tmp_path, dtype):
    nets = [net.to(dtype) for net in networks()]
    before = [[parameter.clone() for parameter in net.parameters()] for net in nets]
    factors = random_factors(fresh(SMALL), OURS)
    merged(
        nets, written(tmp_path / "a.safetensors", {n: (d.half(), u.half()) for n, (d, u) in factors.items()}, alpha=2.0)
    )
    wanted = {id(weight_of(nets, name)): name for name in factors}
    for net, old in zip(nets, before, strict=True):
        for own, was in zip(net.parameters(), old, strict=True):
            if id(own) in wanted:
                down, up = (factor.half().float().flatten(1) for factor in factors[wanted[id(own)]])
                was = (was.float() + (2 / RANK) * (up @ down).view_as(was)).to(dtype)
            assert torch.equal(own, was) and own.dtype == dtype


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_by_name_in_weights_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", tmp_path)
    (tmp_path / "loras").mkdir()
    nets = fresh(SMALL)
    written(tmp_path / "loras" / "ink.safetensors", random_factors(nets, TEXT))
    (lora,) = read_loras(["ink:-0.5"], *nets)
    assert (lora.path, lora.strength) == (tmp_path / "loras" / "ink.safetensors", -0.5)
    assert read_loras(["ink.safetensors"], *nets)[0].path == lora.path
    for name in ("oil", "../loras/ink", "ink\0"):
        assert f'there is no LoRA "{name}"' in error_of(read_loras, [name], *nets)
    check_loras(["ink"], SMALL)
    unet, text = replace(SMALL.unet, context_width=20), TextConfig(width=20, heads=2)
    narrower = replace(SMALL, unet=unet, text=text)
    assert "does not fit its weight" in error_of(check_loras, ["ink"], narrower)
    with pytest.raises(ValueError, match='"ink" has the strength nan'):
        read_loras(["ink:nan"], *nets)
    written(tmp_path / "a:0.5", random_factors(nets, TEXT))  # a name that ends like a strength
    assert read_loras([str(tmp_path / "a:0.5")], *nets)[0].strength == 1


def proj_in(**shapes):
    """Keys of one weight, [32, 32, 1, 1]."""
    ends = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
    return {f"lora_unet_mid_block_attentions_0_proj_in.{ends.get(name, name)}": shape for name, shape in shapes.items()}


Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
GOOD = {f"{Q}.lora_down.weight": (2, 16), f"{Q}.lora_up.weight": (16, 2)}
WRONG = [
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 16)}, "is a LoRA for SDXL, and only SD 1.x"),
    ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (2, 16)}, "is a LoRA for Flux"),
    ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (2, 16)}, "is a LoRA for SD 3"),
    ({"lora_unet_down_blocks_9.lora_up.weight": (2, 16)}, "1 key of which fit nowhere in this base (lora_unet_down_bl"),
    ({f"{Q}.lora_sideways.weight": (2, 16)}, "1 key of which fit nowhere"),
    ({"emb_params": (2, 16)}, "is not a LoRA: it is a textual inversion"),
    ({"model.diffusion_model.input_blocks.0.0.weight": (2, 16)}, "is not a LoRA: it is a"),
    ({"lora_unet_x": (2, 16)}, "is not a LoRA: it is of a kind that is not known"),
    (
        proj_in(down=(2, 32)),
        "change of encoder.middle.transformer.proj_in does not fit its weight of [32, 32, 1, 1], it has",
    ),
    (proj_in(down=(2, 32), up=(32, 3)), "it is [2, 32] (down), [32, 3] (up)"),
    (proj_in(down=(32, 2), up=(2, 32)), "does not fit its weight"),
    (proj_in(down=(0, 32), up=(32, 0), alpha=()), "does not fit its weight"),
    (proj_in(down=(), up=()), "does not fit its weight"),
    (proj_in(down=(2, 32), up=(32, 2), alpha=(2,)), "its alpha has 2 numbers"),
    (proj_in(down=(2, 32), up=(32, 2), dora_scale=(5,)), "does not fit its weight"),
    (proj_in(down=(2, 32), up=(32, 2), mid=(2, 2)), "does not fit its weight"),
    ({"lora_unet_conv_norm_out.alpha": ()}, "change of decoder.norm_out does not fit its weight of [16], it has alpha"),
    (proj_in(lokr_w1=(4, 4)), "does not fit its weight"),
    (proj_in(lokr_w1=(4, 4), lokr_w2=(9, 8)), "it makes [36, 32]"),
    (
        proj_in(down=(2, 32)) | {"unet.mid_block.attentions.0.proj_in.lora.down.weight": (2, 32)},
        "has the change of enc",
    ),
    (
        {f"{Q}.lora_down.weight": (2, 1024), f"{Q}.lora_up.weight": (1024, 2)},
        "is a LoRA for SD 2.x (context width 1024)",
    ),
]


@pytest.mark.parametrize("shapes, said", WRONG)
def test_what_does_not_fit_is_refused_in_a_sentence_and_nothing_is_applied(tmp_path, shapes, said):
    file = tmp_path / "a.safetensors"
    good = {} if "is not a LoRA" in said else GOOD  # what fits beside it is not applied either
    save_file({key: torch.ones(shape) for key, shape in (good | shapes).items()}, file)
    nets = fresh(SMALL)
    before = [parameter.clone() for net in nets for parameter in net.parameters()]
    assert said in error_of(lambda: merge_loras(read_loras([str(file)], *nets)))
    assert all(map(torch.equal, (parameter for net in nets for parameter in net.parameters()), before))


def test_numbers_that_are_none_or_too_large(tmp_path):
    nets = networks()
    factors = random_factors(nets, TEXT)
    file = written(
        tmp_path / "a.safetensors", {name: (down * float("nan"), up) for name, (down, up) in factors.items()}
    )
    assert "makes blocks.0.attention." in error_of(merged, nets, file)
    file = written(tmp_path / "b.safetensors", factors)
    halves = [net.half() for net in networks()]
    assert "infinite or NaN in float16: give a smaller strength" in error_of(merged, halves, f"{file}:1e6")
    save_file(
        {f"{Q}.lora_down.weight": torch.ones(2, 16, dtype=torch.int8), f"{Q}.lora_up.weight": torch.ones(16, 2)}, file
    )
    assert "it is not of a floating-point type" in error_of(read_loras, [str(file)], *nets)


@pytest.mark.parametrize("names", ["ink.safetensors", Path("ink.safetensors"), [("ink.safetensors", 0.5)]])
def test_names_are_a_list_of_texts(names):
    with pytest.raises(
        TypeError, match=r'loras is .*ink.*, expected a list of texts such as \["ink.safetensors:0.8"\]'
    ):
        read_loras(names, *fresh(SMALL))
