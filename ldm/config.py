"""The architecture of Stable Diffusion as numbers: frozen dataclasses and their named instances.

A level is one resolution of the UNet or the VAE; level 0 is the finest. Tuples have one entry per level. Numbers that
no model can be built from raise ValueError, wherever they come from.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args


@dataclass(frozen=True)
class UNetConfig:
    """Rombach et al., arXiv 2112.10752, as released in SD 1.x and 2.x."""

    channels: int = 320  # of level 0
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks per level in the encoder; the decoder has one more
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers
    heads: tuple[int, ...] = (8, 8, 8, 8)  # how many attention heads
    context_width: int = 768
    linear_projections: bool = False  # around a transformer: linear (SD 2.x) or 1x1 convolutions (SD 1.x)
    fp32_logits: bool = False  # attention's, on devices that would compute them in half: SD 2.1's exceed fp16
    groups: int = 32  # of every GroupNorm
    latent_channels: int = 4
    inpainting: bool = False  # its encoder also reads the mask, and the latents of what is kept

    def __post_init__(self):
        check_fields(self)
        if not len(self.multipliers) == len(self.attention) == len(self.heads):
            raise ValueError("multipliers, attention and heads must have one entry per level each")
        check_divisible(self.widths, self.groups, "groups")
        for width, heads in zip(self.widths, self.heads, strict=True):
            check_divisible((width,), heads, "heads")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def time_width(self) -> int:
        return 4 * self.channels

    @property
    def input_channels(self) -> int:
        return self.latent_channels + (1 + self.latent_channels) * self.inpainting

    @property
    def without_inpainting(self) -> "UNetConfig":
        """The same reading latents alone, as the encoders do that ControlNets are copied from."""
        return replace(self, inpainting=False)


@dataclass(frozen=True)
class VAEConfig:
    """The KL-regularised autoencoder: images of 8 h x 8 w pixels <-> latents of h x w (four levels)."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks per level in the encoder; the decoder has one more
    groups: int = 32
    latent_channels: int = 4
    scale: float = 0.18215  # a latent times this has a standard deviation of about 1 for the UNet

    def __post_init__(self):
        check_fields(self)
        check_divisible(self.widths, self.groups, "groups")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class TextConfig:
    """The CLIP text transformer.

    Family "clip" is OpenAI's ViT-L of SD 1.x: quick GELU, the last layer's output, prompts padded with the end token.
    Family "open_clip" is the ViT-H of SD 2.x: exact GELU, the penultimate layer's output, prompts padded with 0.
    """

    family: Literal["clip", "open_clip"] = "clip"
    width: int = 768
    heads: int = 12
    layers: int = 12
    vocabulary: int = 49408  # 512 bytes + merges + the start and the end token
    positions: int = 77

    def __post_init__(self):
        check_fields(self)
        check_divisible((self.width,), self.heads, "heads")
        if self.vocabulary < 514 or self.positions < 2:
            raise ValueError(f"a vocabulary of {self.vocabulary} and {self.positions} positions hold no prompt")


@dataclass(frozen=True)
class ScheduleConfig:
    """The forward process: betas linear in their square root, and what the UNet predicts."""

    prediction: Literal["eps", "v", "x0"] = "eps"
    zero_terminal_snr: bool = False  # betas rescaled so that x_T is pure noise, sampled at trailing timesteps
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000

    def __post_init__(self):
        check_fields(self)
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas from {self.beta_start} to {self.beta_end} do not make a schedule")
        if self.zero_terminal_snr and self.prediction == "eps":  # x_T is pure noise, and eps says nothing about x0
            raise ValueError('zero terminal SNR is impossible with prediction "eps": use "v" or "x0"')


@dataclass(frozen=True)
class Config:
    name: str
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    resolution: int = 512  # pixels, the side it was trained at

    def __post_init__(self):
        if not isinstance(self.name, str) or not fits_in(self.resolution, int, "resolution"):
            raise ValueError(f"the name is {self.name!r:.80} and the resolution {self.resolution!r:.80}")
        if (self.text.width, self.vae.latent_channels) != (self.unet.context_width, self.unet.latent_channels):
            raise ValueError("text encoder, UNet and autoencoder are not of one model: their widths differ")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of `to_dict`, also after a round trip through JSON (which turns tuples into lists).

        Raises TypeError for a field that this version does not know, ValueError for numbers that no model has.
        """
        parts = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig, "schedule": ScheduleConfig}
        return cls(**{k: dataclass_from_dict(parts[k], v) if k in parts else v for k, v in values.items()})


def dataclass_from_dict(cls, values: dict):
    """A flat configuration dataclass from JSON's dict, lists turned back into tuples."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# ------------------------------------------------------------------------------------------------------------- checks

LARGEST = 2**16  # no number of an architecture is larger
LARGEST_OF = {"blocks": 16, "layers": 128, "multipliers": 64, "vocabulary": 49408}


def check_fields(config: Any) -> None:
    """Each field of a configuration against its default's type and a plausible range. Raises ValueError."""
    for part in fields(config):
        value = getattr(config, part.name)
        if isinstance(part.default, str):
            if value not in get_args(part.type):
                raise ValueError(f"{part.name} is {value!r:.80}, expected one of {', '.join(get_args(part.type))}")
            continue
        if isinstance(part.default, tuple):
            kind = type(part.default[0])
            fits = isinstance(value, tuple) and 1 <= len(value) <= 8 and all(fits_in(v, kind, part.name) for v in value)
        else:
            fits = fits_in(value, type(part.default), part.name)
        if not fits:
            raise ValueError(f"{part.name} is {value!r:.80}, which no model has")


def fits_in(value: Any, kind: type, name: str) -> bool:
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value) and 0 < value <= LARGEST
    return type(value) is kind and (kind is bool or 1 <= value <= LARGEST_OF.get(name, LARGEST))


def check_divisible(widths: tuple[int, ...], parts: int, what: str) -> None:
    for width in widths:
        if width % parts:
            raise ValueError(f"{width} channels cannot be shared by {parts} {what}")


# ------------------------------------------------------------------------------------------------------ named instances

SD15 = Config("sd15")

_SD2_UNET = UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projections=True, fp32_logits=True)
_SD2_TEXT = TextConfig("open_clip", width=1024, heads=16, layers=24)

SD21_BASE = Config("sd21-base", unet=_SD2_UNET, text=_SD2_TEXT)
SD21 = Config("sd21", unet=_SD2_UNET, text=_SD2_TEXT, schedule=ScheduleConfig("v"), resolution=768)
# SD 2.0 has the same architecture.
SD20_BASE = replace(SD21_BASE, name="sd20-base")
SD20 = replace(SD21, name="sd20")
# Trained on from SD 1.5 and from the 512x512 SD 2.0.
SD15_INPAINTING = replace(SD15, name="sd15-inpainting", unet=replace(SD15.unet, inpainting=True))
SD20_INPAINTING = replace(SD20_BASE, name="sd20-inpainting", unet=replace(_SD2_UNET, inpainting=True))

# The family at the size of a laptop: 128x128 images, 16x16 latents. Its few groups keep a flat image's colour
# readable through the norms: with 32 groups of one channel each, GroupNorm would take every channel's mean away.
# Attention has fp32_logits, because on CPUs its backward pass is slower in bf16 than in fp32; all else trains twice as
# fast in bf16 where there are matrix units.
TINY = Config(
    "tiny",
    unet=UNetConfig(
        channels=64,
        multipliers=(1, 2, 2),
        blocks=1,
        attention=(True, True, True),
        heads=(2, 4, 4),
        context_width=192,
        fp32_logits=True,
        groups=4,
    ),
    vae=VAEConfig(channels=24, multipliers=(1, 2, 4, 6), blocks=1, groups=1),
    text=TextConfig("clip", width=192, heads=6, layers=4, vocabulary=4096),
    schedule=ScheduleConfig("v", zero_terminal_snr=True),
    resolution=128,
)

PRESETS = {
    config.name: config for config in (SD15, SD21_BASE, SD21, SD20_BASE, SD20, SD15_INPAINTING, SD20_INPAINTING, TINY)
}
