"""An architecture that makes no sense cannot be built, whoever describes it."""

import pytest

from ldm.config import PRESETS, Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_presets_survive_their_description(config):
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "kind, values, sentence",
    [
        (UNetConfig, {"channels": "320"}, "channels is '320'"),
        (UNetConfig, {"channels": 10**12}, "channels is 1000000000000"),
        (UNetConfig, {"channels": True}, "channels is True"),
        (UNetConfig, {"multipliers": [1, 2, 4, 4]}, "multipliers is \\[1, 2, 4, 4\\]"),
        (UNetConfig, {"attention": (True, True)}, "one entry per level each"),
        (UNetConfig, {"groups": 7}, "320 channels cannot be shared by 7 groups"),
        (UNetConfig, {"heads": (8, 8, 8, 7)}, "1280 channels cannot be shared by 7 heads"),
        (VAEConfig, {"scale": float("nan")}, "scale is nan"),
        (VAEConfig, {"groups": 48}, "128 channels cannot be shared by 48 groups"),
        (TextConfig, {"family": "t5"}, "family is 't5', expected one of clip, open_clip"),
        (TextConfig, {"vocabulary": 100}, "hold no prompt"),
        (ScheduleConfig, {"beta_end": 1.5}, "do not make a schedule"),
        (Config, {"name": "x", "resolution": "512"}, "the resolution '512'"),
        (Config, {"name": "x", "text": TextConfig(width=1024, heads=16)}, "are not of one model"),
        (Config, {"name": "x", "vae": VAEConfig(latent_channels=16)}, "are not of one model"),
    ],
)
def test_numbers_that_no_model_has(kind, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**values)
