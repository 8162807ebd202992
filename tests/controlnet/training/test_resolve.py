"""From a command line to a run's settings: how long it trains, and what it says of its learning rate."""

import pytest
from small import SMALLEST, small_sd

from controlnet.training.options import parse_args
from controlnet.training.resolve import resolve
from controlnet.training.run_state import RunFolder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    small_sd(SMALLEST).save(path)
    return str(path)


def settings_of(base, out, words):
    return resolve(parse_args("", ["--base", base, "--out", str(out), *words.split()]))


@pytest.mark.parametrize(
    "words, steps",
    [
        ("--epochs 3 --images 10 --batch-size 4", 8),  # of 30 samples the last step needs two more
        ("--epochs 0.5 --images 8 --batch-size 2 --accumulate 2", 1),
        ("--epochs 2 --batch-size 8", 500),  # a synthetic dataset has 2000
        ("--epochs 2 --images 6 --batch-size 3 --no-cache", 4),
    ],
)
def test_epochs_are_rounds_through_the_data(base, tmp_path, words, steps):
    assert settings_of(base, tmp_path, words).steps == steps


def test_data_without_end_has_no_epochs(base, tmp_path):
    with pytest.raises(ValueError, match="drawn without end"):
        settings_of(base, tmp_path, "--epochs 2 --no-cache")


def test_a_run_goes_on_for_as_long_as_was_said_last(base, tmp_path):
    first = settings_of(base, tmp_path, "--epochs 2 --images 8 --batch-size 2")
    RunFolder(tmp_path).begin(0, first, {})
    for words, length in (("", (8, 2)), ("--epochs 3", (12, 3)), ("--steps 5", (5, None))):
        settings = settings_of(base, tmp_path, f"--resume {words}")
        assert (settings.steps, settings.epochs) == length
