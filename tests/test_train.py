"""train.py itself, run on a small random base: what it writes, that it resumes exactly, and its errors."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import active_children, current_process
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import SMALL, small_control, small_sd

import train
from controlnet.hints import detect as detector
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from controlnet.training import options as train_options
from controlnet.training.folders import list_folder
from controlnet.training.resolve import resolve
from controlnet.training.sources import FolderSource, Transform, split

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    small_sd().save(path)
    return path


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory):
    """Latents that the runs share: each would compute the same."""
    folder = tmp_path_factory.mktemp("latents")
    assert run(base, tmp_path_factory.mktemp("first"), "--steps", "1", "--cache", str(folder)) == 0
    return ["--cache", str(folder)]


def options(base, out):
    few = ["--images", "8", "--batch-size", "2", "--warmup", "1", "--validation", "2", "--sample-count", "0"]
    return ["--base", str(base), "--out", str(out), *few, "--device", "cpu", "--save-every", "2", "--lr", "1e-3"]


def run(base, out, *arguments: str) -> int:
    return train.main([*options(base, out), *arguments])


def resume(out, *arguments: str) -> int:
    """With the run's own settings: nothing of `options` is said again."""
    return train.main(["--resume", "--out", str(out), "--device", "cpu", *arguments])


def control_of(out):
    return load_file(out / "control.safetensors")


def assert_same_run(a, b):
    """Weights, optimiser, scaler, rate, average and position to the last bit, and what was logged of each step."""
    assert_equal(control_of(a), control_of(b))
    assert_equal(*(torch.load(sorted((Path(out) / "state").iterdir())[-1], weights_only=True) for out in (a, b)))
    assert steps_of(a) == steps_of(b)


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def steps_of(out):
    """What log.jsonl says, without what depends on the machine."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "memory_gb")} for line in lines]


# ----------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("name, recipe", [("small", train_options.PAPER), ("tiny", train_options.LAPTOP)])
def test_what_nobody_gives_depends_on_the_base(tmp_path, name, recipe):
    sd = small_sd()
    sd.config = replace(sd.config, name=name)
    sd.save(tmp_path / "base.safetensors")
    argv = ["--base", str(tmp_path / "base.safetensors"), "--out", str(tmp_path / "out"), "--lr", "0.5"]
    settings = resolve(train_options.parse_args("", argv))
    assert {name: getattr(settings, name) for name in recipe} == {**recipe, "lr": 0.5}


# --------------------------------------------------------------------------------------------------- what is left


def test_a_run_leaves_a_control_a_grid_a_log_and_its_settings(base, tmp_path, capsys):
    assert run(base, tmp_path, "--steps", "2", "--sample-count", "2") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("training on 8 pairs of fill50k, 2 for validation: a synthetic dataset")
    assert said[-1].endswith(f"--hint circle.png --control {tmp_path / 'control.safetensors'}")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith("cache/")}
    want = {"control.safetensors", "state/000002.pt", "samples/000002.png", "log.jsonl", "settings.json"}
    assert files == want
    control = control_of(tmp_path)
    assert len([key for key in control if key.startswith("control_model.zero_convs.")]) == 2 * 6
    assert all(control[key].abs().max() > 0 for key in control if ".zero_convs." in key)

    first, second = steps_of(tmp_path)
    assert [first["step"], second["step"]] == [1, 2]
    assert first.keys() == {"step", "loss", "lr", "gradient", "skipped", "bad"}
    assert second.keys() - first.keys() == {"validation_loss", "zero_convs", "iou"}
    assert len(second["zero_convs"]) == 7 and min(second["zero_convs"]) > 0 and 0 <= second["iou"] <= 1
    with Image.open(tmp_path / "samples" / "000002.png") as grid:
        assert grid.size == (4 * SMALL.resolution, 2 * SMALL.resolution)

    written = json.loads((tmp_path / "settings.json").read_text())
    assert written["settings"]["batch_size"] == 2 and written["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("option, status", [("--help", 0), ("--stepz", 2)])
def test_help_and_mistakes_answer_without_torch(tmp_path, option, status):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "train.py", option]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status and "--resume" in done.stdout + done.stderr


def test_only_the_newest_states_are_kept(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "6", *cache) == 0
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["000004.pt", "000006.pt"]


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "how", [["--ema", "0.9", "--accumulate", "2"], ["--precision", "fp16", "--batch-size", "1"], ["--no-cache"]]
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(base, tmp_path, how):
    how = [*how, "--validation", "0", "--save-every", "1", "--images", "4", "--cache", str(tmp_path / "latents")]
    assert run(base, tmp_path / "whole", "--steps", "2", *how) == 0
    assert run(base, tmp_path / "parts", "--steps", "1", *how) == 0
    assert resume(tmp_path / "parts", "--steps", "2") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def start(base, out, *arguments):
    command = [sys.executable, "train.py", *options(base, out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)


def kill_at(process, out, step):
    """Anywhere in a step, or in a save, after that many lines of the log."""
    while process.poll() is None and not ((out / "log.jsonl").exists() and len(logged(out)) >= step):
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def logged(out):
    return (out / "log.jsonl").read_text().splitlines()


def test_a_run_that_was_killed_again_and_again_ends_as_if_it_was_not(base, tmp_path, cache):
    killed, how = tmp_path / "killed", ["--steps", "12", *cache]
    kill_at(start(base, killed, *how), killed, step=random.randint(1, 4))
    kill_at(start(base, killed, "--resume", *how), killed, step=random.randint(5, 9))
    assert resume(killed, *how) == 0
    assert run(base, tmp_path / "whole", *how) == 0
    assert_same_run(tmp_path / "whole", killed)


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, "0"), (signal.SIGTERM, "0"), (signal.SIGTERM, "1")])
def test_a_signal_saves_the_step_and_stops(base, tmp_path, cache, capsys, monkeypatch, number, workers):
    """Also one that goes to the whole process group, as Ctrl-C in a terminal does."""
    calls, how, original = [], [*cache, "--workers", workers], ControlLoss.forward

    def loss(*args):
        calls.append(args)
        if len(calls) == 3:
            pids = [process.pid for process in (*active_children(), current_process())]
            group = [str(pid) for pid in pids if os.getpgid(pid) == os.getpgrp()]
            subprocess.run(["kill", f"-{number:d}", *group], check=True)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ControlLoss, "forward", loss)
        assert run(base, tmp_path / "parts", "--steps", "5", "--save-every", "100", *how) == 128 + number
    assert "saved after step 3: go on with --resume --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "parts" / "state").iterdir()] == ["000003.pt"]
    assert (tmp_path / "parts" / "control.safetensors").exists()
    assert signal.getsignal(number) is not None and resume(tmp_path / "parts") == 0
    assert run(base, tmp_path / "whole", "--steps", "5", *cache) == 0
    assert_equal(control_of(tmp_path / "whole"), control_of(tmp_path / "parts"))


def test_a_run_can_be_resumed_at_another_rate(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "2", *cache) == 0
    before = control_of(tmp_path)
    assert resume(tmp_path, "--steps", "4", "--lr", "1e-30") == 0
    after = control_of(tmp_path)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_finished_run_is_said_to_be_and_its_control_is_written_again(base, tmp_path, cache, capsys):
    assert run(base, tmp_path, "--steps", "1", *cache) == 0
    before = control_of(tmp_path)
    (tmp_path / "control.safetensors").unlink()
    assert resume(tmp_path) == 0
    assert "all steps are done" in capsys.readouterr().out
    assert_equal(control_of(tmp_path), before)


def test_damaged_settings_are_one_sentence(base, tmp_path, cache, capsys):
    assert run(base, tmp_path, "--steps", "1", *cache) == 0
    whole = (tmp_path / "settings.json").read_text()
    capsys.readouterr()
    for damaged in (whole[:50], "[]", "{}"):
        (tmp_path / "settings.json").write_text(damaged)
        assert resume(tmp_path, "--steps", "2") == 2
        error = capsys.readouterr().err
        assert "settings.json is damaged" in error and error.strip().count("\n") == 0


def test_a_run_is_not_resumed_as_another(base, tmp_path, cache, capsys):
    assert run(base, tmp_path, "--steps", "2", *cache) == 0
    before = (tmp_path / "control.safetensors").read_bytes()
    assert resume(tmp_path, "--steps", "4", "--seed", "1") == 2
    assert "was started with --seed 0, not 1" in capsys.readouterr().err
    assert resume(tmp_path, "--steps", "4", "--precision", "bf16") == 2
    assert "--precision" in capsys.readouterr().err
    assert (tmp_path / "control.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- method


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_takes_the_path_of_cuda_and_keeps_the_copy_in_fp32(base, tmp_path, precision):
    assert run(base, tmp_path, "--steps", "2", "--precision", precision, "--images", "2", "--validation", "1") == 0
    control = control_of(tmp_path)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in control.values())
    assert all(control[key].abs().max() > 0 for key in control if ".zero_convs." in key)
    scaler = torch.load(tmp_path / "state" / "000002.pt", weights_only=True)["optimisation"]["scaler"]
    assert bool(scaler) == (precision == "fp16")


@pytest.mark.parametrize("how", [["--checkpointing"], ["--batch-size", "1", "--accumulate", "2"], ["--workers", "1"]])
def test_what_must_not_change_the_result_does_not(base, tmp_path, cache, how):
    """Checkpointing, the cutting of a step into accumulated batches, and who reads the hints."""
    assert run(base, tmp_path / "plain", "--steps", "3", *cache) == 0
    assert run(base, tmp_path / "other", "--steps", "3", *cache, *how) == 0
    plain, other = control_of(tmp_path / "plain"), control_of(tmp_path / "other")
    for key in plain:  # an untrained zero convolution takes a whole first step of Adam on the sign of rounding
        torch.testing.assert_close(plain[key], other[key], rtol=1e-3, atol=2e-5)
    for a, b in zip(steps_of(tmp_path / "plain"), steps_of(tmp_path / "other"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_latents_from_the_cache_are_those_of_each_step(base, tmp_path, cache):
    assert run(base, tmp_path / "cached", "--steps", "2", *cache) == 0
    assert run(base, tmp_path / "live", "--steps", "2", "--no-cache") == 0
    cached, live = steps_of(tmp_path / "cached"), steps_of(tmp_path / "live")
    assert [line["loss"] for line in cached] == pytest.approx([line["loss"] for line in live], rel=1e-4)


def test_the_cosine_rate_falls_to_zero_and_the_constant_one_does_not(base, tmp_path, cache):
    for name, rest in (("constant", 1e-3), ("cosine", 0.0)):
        assert run(base, tmp_path / name, "--steps", "2", "--lr-schedule", name, *cache) == 0
        state = torch.load(tmp_path / name / "state" / "000002.pt", weights_only=True)
        assert state["optimisation"]["lr_schedule"]["_last_lr"] == [pytest.approx(rest, abs=1e-9)]


def test_an_unlocked_decoder_is_trained_and_saved_beside_the_control(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "2", "--sd-unlocked", *cache) == 0
    before, after = load_file(base), load_file(tmp_path / "base.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    start_of_decoder = ("model.diffusion_model.output_blocks.", "model.diffusion_model.out.")
    assert changed and all(key.startswith(start_of_decoder) for key in changed)
    assert resume(tmp_path, "--steps", "3") == 0
    assert not torch.equal(load_file(tmp_path / "base.safetensors")[min(changed)], after[min(changed)])


def test_only_the_middle_is_controlled(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "2", "--only-mid-control", *cache) == 0
    control = control_of(tmp_path)
    assert all(not tensor.any() for key, tensor in control.items() if ".zero_convs." in key)
    assert all(control[key].any() for key in control if ".middle_block_out." in key)


@pytest.mark.parametrize("name", ["lite", "gaussian"])
def test_the_papers_ablations_are_trained_saved_and_loaded(base, tmp_path, cache, name):
    assert run(base, tmp_path, "--steps", "1", "--architecture", name, "--lr", "1e-30", *cache) == 0
    sd, values = small_sd(), control_of(tmp_path)
    control = ControlNet.load(tmp_path / "control.safetensors", sd.unet)
    assert any("transformer_blocks" in key for key in values) == (name == "gaussian")
    start = values["control_model.zero_convs.2.0.weight"]
    assert start.std() > 0.1 if name == "gaussian" else start.abs().max() < 1e-20
    x, t, context, hint = torch.ones(1, 4, 8, 8), torch.tensor([9]), sd.encode_text(["a"]), torch.ones(1, 3, 64, 64)
    assert [r.shape for r in control(x, t, context, hint)] == [
        r.shape for r in ControlNet.from_unet(sd.unet)(x, t, context, hint)
    ]
    assert train.main(["--resume", "--out", str(tmp_path), "--device", "cpu", "--architecture", "full"]) == 2


def test_training_goes_on_from_a_control(base, tmp_path, cache):
    small_control(small_sd()).save(tmp_path / "before.safetensors")
    before = load_file(tmp_path / "before.safetensors")
    assert (
        run(
            base,
            tmp_path / "on",
            "--steps",
            "1",
            "--lr",
            "1e-30",
            "--control",
            str(tmp_path / "before.safetensors"),
            *cache,
        )
        == 0
    )
    after = control_of(tmp_path / "on")
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-20)


def test_the_average_is_what_is_saved(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "3", "--ema", "0.5", *cache) == 0
    state = torch.load(tmp_path / "state" / "000003.pt", weights_only=True)
    saved, key = control_of(tmp_path), "middle_zero_conv.weight"
    average = state["average"][f"module.{key}"]
    assert torch.equal(saved["control_model.middle_block_out.0.weight"], average)
    assert not torch.equal(state["control"][key], average)


def test_the_control_can_be_saved_in_half(base, tmp_path, cache):
    assert run(base, tmp_path, "--steps", "1", "--save-dtype", "fp16", *cache) == 0
    assert {tensor.dtype for tensor in control_of(tmp_path).values()} == {torch.float16}


# ------------------------------------------------------------------------------------------------- data of one's own


def own_pairs(folder, count=6, channels=3):
    """Pictures of 96x64 in the layout of fill50k."""
    (folder / "pictures").mkdir(parents=True)
    lines, rng = [], np.random.default_rng(0)
    for i in range(count):
        for kind in ("source", "target"):
            pixels = rng.integers(0, 256, (64, 96, channels if kind == "source" else 3), dtype=np.uint8).squeeze()
            Image.fromarray(pixels).save(folder / "pictures" / f"{kind}{i}.png")
        names = {kind: f"pictures/{kind}{i}.png" for kind in ("source", "target")}
        lines.append(json.dumps({**names, "prompt": f"number {i}"}))
    (folder / "prompt.json").write_text("\n".join(lines))
    return ["--data", str(folder), "--images", "100"]


@pytest.mark.parametrize("channels, how", [(3, []), (1, []), (4, ["--no-cache", "--flip", "--random-crop"])])
def test_a_folder_of_pairs_is_trained_on(base, tmp_path, channels, how):
    data = own_pairs(tmp_path / "pairs", channels=channels)
    chosen = [*data, "--size", "128x64", "--hint-channels", str(channels), "--sample-count", "1", *how]
    assert run(base, tmp_path / "out", "--steps", "2", *chosen) == 0
    assert control_of(tmp_path / "out")["control_model.input_hint_block.0.weight"].shape[1] == channels
    with Image.open(tmp_path / "out" / "samples" / "000002.png") as grid:
        assert grid.size == (4 * 128, 64)


def test_hints_are_made_from_the_pictures(base, tmp_path):
    data = own_pairs(tmp_path / "pairs")
    assert run(base, tmp_path / "out", "--steps", "1", *data, "--detect", "canny") == 0
    with Image.open(tmp_path / "out" / "cache" / "hints" / "000000.png") as hint:
        assert set(np.unique(np.array(hint))) == {0, 255}


def test_a_detector_is_one_for_pictures_and_has_options(base, tmp_path, capsys):
    data = [*own_pairs(tmp_path / "pairs"), "--no-cache", "--steps", "1"]
    for detect, words in (("depth", "no hints from images"), ("canny:lo=5", "no option"), ("none", "no detector")):
        assert run(base, tmp_path / "out", *data, "--detect", detect) == 2
        assert words in capsys.readouterr().err
    assert run(base, tmp_path / "out", *data, "--detect", "canny", "--hint-channels", "1") == 2
    assert "3 channels" in capsys.readouterr().err
    source = FolderSource("x", list_folder(tmp_path / "pairs").entries, Transform((64, 64)), detect="canny:low=255")
    assert not np.array_equal(source.hint(0), detector("canny", source.sample(0).image))
    assert np.array_equal(source.hint(0), detector("canny", source.sample(0).image, low=255))


def test_a_grid_of_pictures_that_are_trained_on_leaves_bad_ones_out(base, tmp_path):
    data = own_pairs(tmp_path / "pairs", count=3)
    (tmp_path / "pairs" / "pictures" / "target0.png").write_bytes(b"no picture")
    few = ["--validation", "0", "--sample-count", "3", "--bad-share", "0.5"]
    assert run(base, tmp_path / "out", "--steps", "1", *data, *few) == 0
    with Image.open(tmp_path / "out" / "samples" / "000001.png") as grid:
        assert grid.size == (4 * 64, 2 * 64)


def test_bad_samples_are_skipped_and_counted_up_to_a_share(base, tmp_path, capsys):
    data = own_pairs(tmp_path / "pairs", count=8)
    entries = (tmp_path / "pairs" / "prompt.json").read_text()
    (tmp_path / "pairs" / "prompt.json").write_text(entries + "\n{broken\n")
    trained_on, _ = split(list_folder(tmp_path / "pairs").entries, validation=2)
    trained_on[1].image.write_bytes(b"no picture")
    assert run(base, tmp_path / "few", "--steps", "3", *data, "--bad-share", "0.3") == 0
    assert steps_of(tmp_path / "few")[-1]["bad"] == 2
    capsys.readouterr()
    for how in ([], ["--no-cache"]):
        assert run(base, tmp_path / "many", "--steps", "3", *data, "--bad-share", "0.15", *how) == 2
        error = capsys.readouterr().err
        assert "2 of 7 samples are bad" in error and "tools.check_data" in error
        assert not (tmp_path / "many" / "control.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------- errors


def test_another_run_is_not_overwritten(base, tmp_path, cache, capsys):
    assert run(base, tmp_path, "--steps", "2", *cache) == 0
    before = (tmp_path / "control.safetensors").read_bytes()
    assert run(base, tmp_path, "--steps", "2", *cache) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert (tmp_path / "control.safetensors").read_bytes() == before


BAD_CALLS = [
    (["--resume"], "no run to resume"),
    (["--base", "none.safetensors"], "none.safetensors"),
    (["--data", "nowhere"], 'no folder "nowhere"'),
    (["--data", "./nowhere"], "does not exist"),
    (["--size", "100"], "multiples of"),
    (["--size", "128x64"], "are square"),
    (["--flip"], "--no-cache"),
    (["--ema", "0.9", "--sd-unlocked"], "leave out one"),
    (["--device", "cuda:77"], "cuda:77"),
    (["--out", "/dev/null/run"], "another folder"),
    (["--control", "x.safetensors", "--architecture", "lite"], "leave out --architecture"),
    (["--cache", "/proc"], "empty or new folder as --cache"),
    (["--optimizer", "adamw8bit"], "pip install bitsandbytes"),
    (["--tensorboard"], "pip install tensorboard"),
]


@pytest.mark.parametrize("arguments, words", BAD_CALLS)
def test_a_bad_call_is_one_sentence(base, tmp_path, capsys, arguments, words):
    if words.startswith("pip install") and find_spec(words.split()[-1]):
        pytest.skip(f"{words.split()[-1]} is installed here")
    assert run(base, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out" / "control.safetensors").exists()


@pytest.mark.parametrize(
    "option, value",
    [
        ("--steps", "x"),
        ("--seed", "-1"),
        ("--lr", "0"),
        ("--clip", "nan"),
        ("--prompt-dropout", "2"),
        ("--size", "64x"),
    ],
)
def test_a_number_that_means_nothing_is_refused(capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        train.main([option, value])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f'argument {option}: it is "{value}", expected' in error


def test_a_dry_run_says_what_would_be_trained_and_leaves_nothing(tmp_path, capsys):
    """Without the base's weights, and with an endless world's default of pictures."""
    plan = ["--steps", "10", "--batch-size", "4", "--accumulate", "5", "--out", str(tmp_path / "out"), "--dry-run"]
    assert train.main(["--base", "tiny", *plan]) == 0
    out = capsys.readouterr().out
    assert "2000 pairs of 128x128 pixels, 200 samples seen (0.1 epochs)" in out and "10 optimizer steps of 5 x 4" in out
    assert "activations" in out and "at most, all together" in out
    assert not (tmp_path / "out").exists()


def test_no_memory_is_one_sentence(base, tmp_path, cache, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(ControlLoss, "forward", fail)
    assert run(base, tmp_path, *cache) == 2
    assert "out of memory: take a smaller --batch-size" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_the_last_state_is_whole(base, tmp_path, cache, capsys):
    """No file may grow beyond half a state: the system's way to test it without a disk."""
    assert run(base, tmp_path, "--steps", "2", *cache) == 0
    before = (tmp_path / "state" / "000002.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert resume(tmp_path, "--steps", "4") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "what was saved is intact" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["000002.pt"]
    assert (tmp_path / "state" / "000002.pt").read_bytes() == before
    assert resume(tmp_path, "--steps", "4") == 0
