"""From a command line to a run's settings: how long it trains, and what it says of its learning rate."""

from dataclasses import replace

import pytest
from small import SMALLEST, small_sd

from controlnet.training.options import FULL_SIZE, LAPTOP, TrainSettings, parse_args
from controlnet.training.resolve import resolve, with_defaults
from controlnet.training.run_state import Position, RunFolder, state_of, write_state
from ldm.config import TINY


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    small_sd(SMALLEST).save(path)
    return str(path)


def settings_of(base, out, words):
    return resolve(parse_args("", ["--base", base, "--out", str(out), *words.split()]))


@pytest.mark.parametrize("config, defaults", [(SMALLEST, FULL_SIZE), (TINY, LAPTOP)])
def test_what_nobody_gives_depends_on_the_base(config, defaults):
    settings = with_defaults(TrainSettings(lr=0.5), config)
    assert {name: getattr(settings, name) for name in defaults} == {**defaults, "lr": 0.5}


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


def test_epochs_are_as_long_where_a_run_goes_on_with_other_batches(base, tmp_path):
    first = settings_of(base, tmp_path, "--epochs 2 --images 8 --batch-size 2")
    RunFolder(tmp_path).begin(0, first, {})
    write_state(tmp_path / "state" / "000003.pt", state_of(3, {"position": Position(seen=6)}))  # of 16: ten are left
    for words, steps in (("", 8), ("--batch-size 4", 6), ("--accumulate 5", 4), ("--epochs 0.5", 3)):
        assert settings_of(base, tmp_path, f"--resume {words}").steps == steps


def test_what_settings_json_leaves_open_is_the_default_of_the_base(base, tmp_path):
    first = settings_of(base, tmp_path, "--steps 8")
    RunFolder(tmp_path).begin(0, replace(first, lr_schedule=None, batch_size=None), {})
    (tmp_path / "state" / "000003.pt").touch()
    assert settings_of(base, tmp_path, "--resume --steps 20") == replace(first, steps=20, resume=True)


@pytest.mark.parametrize("schedule, steps, said", [("cosine", 4, 1), ("cosine", 2, 0), ("constant", 4, 0)])
def test_a_rate_that_rises_again_is_said(base, tmp_path, capsys, schedule, steps, said):
    first = settings_of(base, tmp_path, f"--steps 2 --lr 1e-3 --warmup 1 --lr-schedule {schedule}")
    RunFolder(tmp_path).begin(0, first, {})
    (tmp_path / "state" / "000002.pt").touch()
    settings_of(base, tmp_path, f"--resume --steps {steps}")
    error = capsys.readouterr().err
    assert error.count("the learning rate rises at step 2 from 0.0e+00 to 5.0e-04: cosine takes 4 steps now, ") == said
    assert error.count("the learning rate") == said


@pytest.mark.parametrize(
    "name, before, now, words",
    [
        ("seed", 0, 3, "with --seed 0, not 3"),
        ("size", None, "64x64", "without --size"),
        ("sd_unlocked", False, True, "without --sd-unlocked"),
        ("lora", [], ["a"], "without --lora"),
    ],
)
def test_a_run_says_what_it_was_started_with(tmp_path, name, before, now, words):
    with pytest.raises(ValueError, match=f"was started {words}: leave it out"):
        RunFolder(tmp_path).check_fixed({name: now}, {name: before})


def test_a_run_is_no_folder_of_data(base, tmp_path):
    with pytest.raises(ValueError, match="--out is the folder of --data, .*: give another folder as --out"):
        settings_of(base, tmp_path, f"--data {tmp_path}/./ --epochs 1")
