"""What a run tells its user."""

import shlex
from pathlib import Path

import infer
from controlnet.training.options import TrainSettings
from controlnet.training.resolve import infer_command
from controlnet.training.run_state import RunFolder

RUN = RunFolder(Path("my runs/1"))


def told(**settings):
    """What infer.py reads from the command."""
    python, program, *options = shlex.split(infer_command(TrainSettings(data="pairs", **settings), RUN))
    assert (python, program) == ("python", "infer.py")
    given = infer.parse_args(options)
    assert given.pop("hint") == ["HINT.png"] and given.pop("control") == [str(RUN.control)]
    return given


def test_the_command_to_try_names_all_that_the_base_was_loaded_with():
    settings = {"base": "my base.ckpt", "lora": ["ink:0.5", "fog"], "vae": "v.pt", "prediction": "v", "zero_snr": True}
    assert told(**settings) == settings
    assert told(base="sd15") == {"base": "sd15"}
    assert told(**settings, sd_unlocked=True) == {"base": str(RUN.base)}
