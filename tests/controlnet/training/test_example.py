"""What a run tells its user to try."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from controlnet.training.example import example_of, infer_command
from controlnet.training.options import TrainSettings
from controlnet.training.run_state import RunFolder
from controlnet.worlds import Sample

RUN = RunFolder(Path("my runs/1"))
SAMPLE = Sample(np.full((4, 6, 3), 9, np.uint8), np.full((4, 6, 3), 5, np.uint8), "a cat's tail")


def told(run=RUN, sample=SAMPLE, example=None, **settings):
    """What infer.py reads from the command."""
    settings = TrainSettings(data="pairs", **settings)
    python, program, *options = shlex.split(infer_command(settings, run, example or example_of(settings, run, sample)))
    assert (python, program) == ("python", "infer.py")
    given = infer.parse_args(options)
    assert given.pop("control") == [str(run.control)]
    return given


def test_the_command_to_try_names_all_that_the_base_was_loaded_with():
    settings = {"base": "my base.ckpt", "lora": ["ink:0.5", "fog"], "vae": "v.pt", "prediction": "v", "zero_snr": True}
    example = ("hint.png", "a cat")
    hint = {"hint": ["hint.png"], "prompt": "a cat"}
    assert told(**settings, example=example_of(TrainSettings(validate=[example]), RUN, SAMPLE)) == settings | hint
    assert told(base="sd15", validate=[example]) == {"base": "sd15"} | hint
    assert told(**settings, sd_unlocked=True, validate=[example]) == {"base": str(RUN.base)} | hint


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_without_a_hint_of_ones_own_there_is_one_in_the_runs_folder(tmp_path, channels):
    run, hint = RunFolder(tmp_path), np.arange(24 * channels, dtype=np.uint8).reshape(4, 6, channels)
    sample = Sample(SAMPLE.image, hint, SAMPLE.caption)
    given = told(run, sample, size="6x4")
    file = str(tmp_path / "example.png")
    assert given == {"base": "tiny", "hint": [file], "prompt": "a cat's tail", "size": "6x4"}
    assert np.array_equal(np.array(Image.open(file)).reshape(hint.shape), hint)


def test_with_a_detector_it_is_the_image_that_the_detector_is_for(tmp_path):
    run = RunFolder(tmp_path)
    given = told(run, detect="canny:low=50")
    assert given["detect"] == ["canny:low=50"] and given["hint"] == [str(tmp_path / "example.png")]
    assert np.array_equal(np.array(Image.open(tmp_path / "example.png")), SAMPLE.image)
