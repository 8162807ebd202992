"""The programs in tools/ run, on models small enough for a test."""

import json

import numpy as np
import pytest
from PIL import Image
from small import SMALL, small_control, small_sd

from controlnet.worlds import TINY_CONTROL_OF, WORLDS
from controlnet.worlds.colours import BASIC_COLOURS
from tools import convergence, evaluate, make_data, pretrain, strip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sd = small_sd()
    sd.save(folder / "tiny.safetensors")
    for world in ("fill50k", "people"):
        small_control(sd).save(folder / f"{TINY_CONTROL_OF[world]}.safetensors")
    return folder


def test_evaluate_prints_every_measure_with_its_floor(models, capsys):
    base, control, pose = (str(models / f"{name}.safetensors") for name in ("tiny", "tiny-fill50k", "tiny-pose"))
    controls = ["--control", "fill50k", control, "--control", "people", pose]
    assert evaluate.main(["--base", base, *controls, "--count", "2", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("average pooling", "22 basic colours", "all colours", "mismatched", "key points"):
        assert words in out
    for line in ("fill50k with prompt", "fill50k without", "people with prompt", "people without"):
        assert f"control, {line}: mean IoU" in out


def test_evaluate_says_what_is_missing(tmp_path, capsys):
    assert evaluate.main(["--base", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [evaluate, pretrain])
def test_a_device_that_is_not_there_is_a_sentence(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tool.main(["--device", "cuda:99"]) == 2
    assert 'PyTorch finds no device "cuda:99" here' in capsys.readouterr().err


@pytest.mark.parametrize(
    "tool, option",
    [
        (convergence, "--rows=0"),
        (convergence, "--columns=-1"),
        (evaluate, "--count=0"),
        (evaluate, "--steps=0"),
        (evaluate, "--cfg=nan"),
        (make_data, "--seed=-1"),
        (make_data, "--count=0"),
        (pretrain, "--pictures=0"),
        (pretrain, "--vae-lr=-1"),
        (strip, "--columns=0"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_numbers_have_limits(tool, option, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main([option])
    assert stop.value.code == 2 and f'argument {option.split("=")[0]}: it is "{option.split("=")[1]}", expected' in (
        capsys.readouterr().err
    )


def test_evaluate_knows_its_worlds(capsys):
    assert evaluate.main(["--control", "moon", "control.safetensors"]) == 2
    assert 'there is no dataset "moon"' in capsys.readouterr().err


def test_the_strip_shows_hints_beside_images_in_a_row_for_each_control_that_is_there(models, tmp_path):
    path = tmp_path / "strip.png"
    assert strip.main(["--weights", str(models), "--columns", "1", "--out", str(path)]) == 0
    side = SMALL.resolution
    pixels = np.asarray(Image.open(path))
    row = side + strip.CAPTION
    assert pixels.shape == (2 * row, 2 * side, 3)
    for i, name in enumerate(("fill50k", "people")):
        hint = WORLDS[name](side, colours=BASIC_COLOURS, held_out=True)[0].hint
        assert np.array_equal(pixels[i * row : i * row + side, :side], hint)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)], ids=str)
def test_the_convergence_strip_has_a_column_for_each_step_between_hints_and_truths(tmp_path, size):
    run, out = tmp_path / "run", tmp_path / "strip.png"
    (run / "samples").mkdir(parents=True)
    for step in (5, 10, 100, 15):  # a row of a grid: hint, sample, truth, text; the value tells which
        rows = [np.hstack([np.full((*size, 3), 10 * row + x + step, np.uint8) for x in range(4)]) for row in (1, 2)]
        Image.fromarray(np.vstack(rows)).save(run / "samples" / f"{step:06d}.png")
    (run / "samples" / "5a.png").write_text("a user's")
    if size != (32, 32):
        settings = {"settings": {}, "data": {"size": [2 * side for side in size]}}  # the grid has been made smaller
        (run / "settings.json").write_text(json.dumps(settings))
    being_written = '{"step": 5, "loss": 1, "iou": 0.25}\n{"step": 6, "loss": 1}\n{"step": 7, "lo'
    (run / "log.jsonl").write_text(being_written)
    assert convergence.main([str(run), "--rows", "2", "--columns", "3", "--out", str(out)]) == 0
    pixels = np.asarray(Image.open(out))[convergence.CAPTION :: size[0], :: size[1], 0]
    # three of the steps 5, 10, 15 and 100, the samples' value being 10 row + 1 + step, between step 5's 0 and 2
    assert pixels.tolist() == [[15, 16, 26, 111, 17], [25, 26, 36, 121, 27]]
    (run / "log.jsonl").unlink()
    assert convergence.main([str(run), "--out", str(out)]) == 0


def test_a_folder_without_grids_is_no_run(tmp_path, capsys):
    assert convergence.main([str(tmp_path)]) == 2
    assert "has no grids" in capsys.readouterr().err
