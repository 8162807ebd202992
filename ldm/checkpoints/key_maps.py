"""Where each of our parameters stands in a checkpoint: tables of (our module, their module), one table a part.

A parameter called `weight` or `bias` keeps that name, so a table lists modules only. The few parameters that are named
or cut differently have rows of their own. Tables may list modules that a configuration does not have (a shortcut
between equal widths): they are looked up by the parameters that exist, never the other way round.

There are two layouts. "ldm" is that of the released checkpoints of SD 1.x and 2.x. Its `input_blocks` and
`output_blocks` are our `encoder.blocks` and `decoder.blocks`, counted alike; each consists of up to three numbered
modules: what it begins with, a transformer if there is one, an upsampler if there is one. "diffusers" is that of the
library of this name. It counts residual blocks and transformers apart and by level, and spreads a base over a folder:
here a key begins with its subfolder ("unet.", "vae.", "text_encoder.").
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ldm.config import Config, TextConfig, UNetConfig, VAEConfig

Layout = Literal["ldm", "diffusers"]
SGM_TEXT = "conditioner.embedders.0."  # the text encoder's prefix in SD-Turbo's layout, which is otherwise "ldm"
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """A tensor of a file, or some of its rows: `rows` = (first, last + 1) along dimension 0, None for all."""

    key: str
    rows: tuple[int, int] | None = None
    matrix: bool = False  # our 1x1 convolution (A, B, 1, 1) is (A, B) there


@dataclass(frozen=True)
class KeyMap:
    """The table of one part (UNet, autoencoder, text encoder ...) in one layout."""

    prefix: str  # of all its keys in a file
    modules: Rows  # (ours, theirs); their parameters have the same last names
    parameters: dict[str, Source] = field(default_factory=dict)  # our parameter -> theirs, for all others
    matrices: frozenset[str] = frozenset()  # our 1x1 convolutions that are linear layers there
    unused: tuple[str, ...] = ()  # how our parameters begin that no output depends on: a file may lack them
    sparse: tuple[str, ...] = ()  # how those begin that are zero where a file leaves them out

    def sources(self, names: Iterable[str]) -> dict[str, Source]:
        """Our parameters' names -> where they stand in a file; without those unused ones that the layout leaves out.

        Raises KeyError for any other one that the table lacks.
        """
        modules = dict(self.modules)
        sources = {}
        for name in names:
            module, _, last = name.rpartition(".")
            if name in self.parameters:
                source = self.parameters[name]
                sources[name] = Source(self.prefix + source.key, source.rows)
            elif module in modules or not name.startswith(self.unused):
                matrix = module in self.matrices and last == "weight"
                sources[name] = Source(f"{self.prefix}{modules[module]}.{last}", matrix=matrix)
        return sources


def names_by_key(sources: dict[str, Source]) -> dict[str, list[str]]:
    """The way back: a file's key -> our parameters that it holds, in the order of their rows."""
    names: dict[str, list[str]] = {}
    for name in sorted(sources, key=lambda name: sources[name].rows or (0, 0)):
        names.setdefault(sources[name].key, []).append(name)
    return names


def base_maps(config: Config, layout: Layout) -> tuple[KeyMap, KeyMap, KeyMap]:
    """Of the UNet, the autoencoder and the text encoder."""
    if layout == "ldm":
        return unet_map(config.unet), vae_map(config.vae), text_map(config.text)
    return diffusers_unet_map(config.unet), diffusers_vae_map(config.vae), diffusers_text_map(config.text)


def under(ours: str, theirs: str, rows: Rows) -> Rows:
    """`rows` inside the modules `ours` and `theirs`."""
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in rows]


# ---------------------------------------------------------------------------------------------------------- UNet

RES_BLOCK = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("shortcut", "skip_connection"),
]

ATTENTION = [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")]

TRANSFORMER_BLOCK = [
    ("norm1", "norm1"),
    *under("self_attention", "attn1", ATTENTION),
    ("norm2", "norm2"),
    *under("cross_attention", "attn2", ATTENTION),
    ("norm3", "norm3"),
    ("feed_forward.expand", "ff.net.0.proj"),
    ("feed_forward.contract", "ff.net.2"),
]

TRANSFORMER = [
    ("norm", "norm"),
    ("proj_in", "proj_in"),
    *under("block", "transformer_blocks.0", TRANSFORMER_BLOCK),
    ("proj_out", "proj_out"),
]

DECODER_BLOCK = [*under("res", "0", RES_BLOCK), *under("transformer", "1", TRANSFORMER)]

# In the encoder it may also be a convolution or a downsampler.
ENCODER_BLOCK = [("conv", "0"), ("conv.conv", "0.op"), *DECODER_BLOCK]

MIDDLE = [*under("res1", "0", RES_BLOCK), *under("transformer", "1", TRANSFORMER), *under("res2", "2", RES_BLOCK)]


def unet_map(config: UNetConfig) -> KeyMap:
    out = [("decoder.norm_out", "out.0"), ("decoder.conv_out", "out.2")]
    return KeyMap("model.diffusion_model.", [*encoder_rows(config), *decoder_rows(config), *out])


def encoder_rows(config: UNetConfig) -> Rows:
    rows = [("encoder.time_embedding.linear1", "time_embed.0"), ("encoder.time_embedding.linear2", "time_embed.2")]
    for i in range(encoder_length(config)):
        rows += under(f"encoder.blocks.{i}", f"input_blocks.{i}", ENCODER_BLOCK)
    return rows + under("encoder.middle", "middle_block", MIDDLE)


def encoder_length(config: UNetConfig) -> int:
    """The first convolution, each level's residual blocks, and a downsampler after each level but the last."""
    levels = len(config.multipliers)
    return 1 + levels * config.blocks + (levels - 1)


def decoder_rows(config: UNetConfig) -> Rows:
    levels = [level for level in reversed(range(len(config.multipliers))) for _ in range(config.blocks + 1)]
    rows = []
    for i, level in enumerate(levels):
        ours, theirs = f"decoder.blocks.{i}", f"output_blocks.{i}"
        rows += under(ours, theirs, DECODER_BLOCK)
        # The upsampler comes right after the transformer, and has its number where there is none.
        rows.append((f"{ours}.upsample.conv", f"{theirs}.{2 if config.attention[level] else 1}.conv"))
    return rows


# ----------------------------------------------------------------------------------------------------- autoencoder

NORMS_AND_CONVS = [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")]
VAE_RES_BLOCK = [*NORMS_AND_CONVS, ("shortcut", "nin_shortcut")]

VAE_ATTENTION = [("norm", "norm"), ("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")]

VAE_MIDDLE = [
    *under("res1", "block_1", VAE_RES_BLOCK),
    *under("attention", "attn_1", VAE_ATTENTION),
    *under("res2", "block_2", VAE_RES_BLOCK),
]

# (our half, their name of a level, their name of the way to the next level)
VAE_HALVES = [("encoder", "down", "downsample"), ("decoder", "up", "upsample")]


def vae_map(config: VAEConfig) -> KeyMap:
    modules = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for half, level_name, resample in VAE_HALVES:
        modules += [(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "norm_out", "conv_out")]
        modules += under(f"{half}.middle", f"{half}.mid", VAE_MIDDLE)
        for i in range(len(config.multipliers)):
            ours, theirs = f"{half}.levels.{i}", f"{half}.{level_name}.{i}"
            modules.append((f"{ours}.resample.conv", f"{theirs}.{resample}.conv"))
            for j in range(config.blocks + 1):  # the encoder has one less
                modules += under(f"{ours}.blocks.{j}", f"{theirs}.block.{j}", VAE_RES_BLOCK)
    return KeyMap("first_stage_model.", modules)


# ---------------------------------------------------------------------------------------------------- text encoder

CLIP_BLOCK = [
    ("norm1", "layer_norm1"),
    ("attention.q", "self_attn.q_proj"),
    ("attention.k", "self_attn.k_proj"),
    ("attention.v", "self_attn.v_proj"),
    ("attention.out", "self_attn.out_proj"),
    ("norm2", "layer_norm2"),
    ("mlp.expand", "mlp.fc1"),
    ("mlp.contract", "mlp.fc2"),
]

OPEN_CLIP_BLOCK = [
    ("norm1", "ln_1"),
    ("attention.out", "attn.out_proj"),
    ("norm2", "ln_2"),
    ("mlp.expand", "mlp.c_fc"),
    ("mlp.contract", "mlp.c_proj"),
]


def text_map(config: TextConfig) -> KeyMap:
    if config.family == "clip":
        return KeyMap("cond_stage_model.transformer.text_model.", clip_rows(config.layers))
    return open_clip_map(config)


def clip_rows(layers: int) -> Rows:
    rows = [
        ("token_embedding", "embeddings.token_embedding"),
        ("position_embedding", "embeddings.position_embedding"),
        ("final_norm", "final_layer_norm"),
    ]
    for i in range(layers):
        rows += under(f"blocks.{i}", f"encoder.layers.{i}", CLIP_BLOCK)
    return rows


def open_clip_map(config: TextConfig) -> KeyMap:
    modules = [("token_embedding", "token_embedding"), ("final_norm", "ln_final")]
    parameters = {
        "position_embedding.weight": Source("positional_embedding"),
        "text_projection": Source("text_projection"),
        "logit_scale": Source("logit_scale"),
    }
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"transformer.resblocks.{i}"
        modules += under(ours, theirs, OPEN_CLIP_BLOCK)
        for j, name in enumerate("qkv"):  # one tensor holds the three, one below the other
            rows = (j * config.width, (j + 1) * config.width)
            parameters[f"{ours}.attention.{name}.weight"] = Source(f"{theirs}.attn.in_proj_weight", rows)
            parameters[f"{ours}.attention.{name}.bias"] = Source(f"{theirs}.attn.in_proj_bias", rows)
    return KeyMap("cond_stage_model.model.", modules, parameters, unused=unused_parameters(config))


def unused_parameters(config: TextConfig) -> tuple[str, ...]:
    """SD 2.x reads the last layer but one. Files that went through diffusers lack what comes after it."""
    return () if config.family == "clip" else (f"blocks.{config.layers - 1}.", "text_projection", "logit_scale")


# ----------------------------------------------------------------------------------------------- diffusers: UNet

DIFFUSERS_RES_BLOCK = [*NORMS_AND_CONVS, ("time", "time_emb_proj"), ("shortcut", "conv_shortcut")]  # also the VAE's


def diffusers_unet_map(config: UNetConfig) -> KeyMap:
    out = [("decoder.norm_out", "conv_norm_out"), ("decoder.conv_out", "conv_out")]
    return KeyMap("unet.", [*diffusers_encoder_rows(config), *diffusers_decoder_rows(config), *out])


def diffusers_encoder_rows(config: UNetConfig) -> Rows:
    rows = [
        ("encoder.time_embedding.linear1", "time_embedding.linear_1"),
        ("encoder.time_embedding.linear2", "time_embedding.linear_2"),
        ("encoder.blocks.0.conv", "conv_in"),
        *under("encoder.middle.res1", "mid_block.resnets.0", DIFFUSERS_RES_BLOCK),
        *under("encoder.middle.transformer", "mid_block.attentions.0", TRANSFORMER),
        *under("encoder.middle.res2", "mid_block.resnets.1", DIFFUSERS_RES_BLOCK),
    ]
    for level in range(len(config.multipliers)):
        first = 1 + level * (config.blocks + 1)  # the first convolution is block 0; each level ends with a downsampler
        for i in range(config.blocks):
            rows += diffusers_block_rows(f"encoder.blocks.{first + i}", f"down_blocks.{level}", i)
        rows.append((f"encoder.blocks.{first + config.blocks}.conv.conv", f"down_blocks.{level}.downsamplers.0.conv"))
    return rows


def diffusers_decoder_rows(config: UNetConfig) -> Rows:
    """Both count from the coarsest level up."""
    rows = []
    for level in range(len(config.multipliers)):
        for i in range(config.blocks + 1):
            ours = f"decoder.blocks.{level * (config.blocks + 1) + i}"
            rows += diffusers_block_rows(ours, f"up_blocks.{level}", i)
        rows.append((f"{ours}.upsample.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return rows


def diffusers_block_rows(ours: str, theirs: str, i: int) -> Rows:
    return [
        *under(f"{ours}.res", f"{theirs}.resnets.{i}", DIFFUSERS_RES_BLOCK),
        *under(f"{ours}.transformer", f"{theirs}.attentions.{i}", TRANSFORMER),
    ]


# ------------------------------------------------------------------------ diffusers: autoencoder and text encoder

DIFFUSERS_VAE_MIDDLE = [
    *under("res1", "resnets.0", DIFFUSERS_RES_BLOCK),
    *under("attention", "attentions.0", [("norm", "group_norm"), *ATTENTION]),
    *under("res2", "resnets.1", DIFFUSERS_RES_BLOCK),
]


def diffusers_vae_map(config: VAEConfig) -> KeyMap:
    modules = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    last = len(config.multipliers) - 1
    for half, level_name, resample in VAE_HALVES:
        modules += [(f"{half}.conv_in", f"{half}.conv_in"), (f"{half}.conv_out", f"{half}.conv_out")]
        modules.append((f"{half}.norm_out", f"{half}.conv_norm_out"))
        modules += under(f"{half}.middle", f"{half}.mid_block", DIFFUSERS_VAE_MIDDLE)
        for i in range(last + 1):
            # They number the levels in the order in which they run.
            number = i if half == "encoder" else last - i
            ours, theirs = f"{half}.levels.{i}", f"{half}.{level_name}_blocks.{number}"
            modules.append((f"{ours}.resample.conv", f"{theirs}.{resample}rs.0.conv"))
            for j in range(config.blocks + 1):  # the encoder has one less
                modules += under(f"{ours}.blocks.{j}", f"{theirs}.resnets.{j}", DIFFUSERS_RES_BLOCK)
    matrices = frozenset(f"{half}.middle.attention.{name}" for half, _, _ in VAE_HALVES for name, _ in ATTENTION)
    return KeyMap("vae.", modules, matrices=matrices)


def diffusers_text_map(config: TextConfig) -> KeyMap:
    """Both families in the layout of transformers' CLIPTextModel; of SD 2.x only the layers that are used."""
    layers = config.layers if config.family == "clip" else config.layers - 1
    return KeyMap("text_encoder.text_model.", clip_rows(layers), unused=unused_parameters(config))
