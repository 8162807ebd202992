"""train.py itself, run on a small random base: what it writes, that it resumes exactly, and its errors."""

import pytest
import torch
from safetensors.torch import load_file
from small import small_sd

import train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    small_sd().save(path)
    return path


def run(base, out, *arguments: str) -> int:
    options = ["--base", str(base), "--out", str(out), "--pictures", "8", "--batch-size", "2", "--warmup", "1"]
    return train.main([*options, "--device", "cpu", "--sample-every", "100", "--save-every", "2", *arguments])


def test_a_run_writes_a_control_a_grid_and_a_log(base, tmp_path):
    assert run(base, tmp_path, "--steps", "2") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "control.safetensors",
        "state.pt",
        "step-000002.png",
        "log.txt",
    }
    control = load_file(tmp_path / "control.safetensors")
    assert len([key for key in control if key.startswith("control_model.zero_convs.")]) == 2 * 6
    assert all(control[key].abs().max() > 0 for key in control if ".zero_convs." in key)
    assert "step 2 loss" in (tmp_path / "log.txt").read_text()


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(base, tmp_path):
    assert run(base, tmp_path / "whole", "--steps", "4") == 0
    assert run(base, tmp_path / "parts", "--steps", "2") == 0
    assert run(base, tmp_path / "parts", "--steps", "4", "--resume") == 0
    whole, parts = (load_file(tmp_path / name / "control.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_takes_the_path_of_cuda_and_keeps_the_copy_in_fp32(base, tmp_path, precision):
    assert run(base, tmp_path, "--steps", "2", "--precision", precision) == 0
    control = load_file(tmp_path / "control.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in control.values())
    assert all(control[key].abs().max() > 0 for key in control if ".zero_convs." in key)
    scaler = torch.load(tmp_path / "state.pt", weights_only=True)["optimisation"]["scaler"]
    assert bool(scaler) == (precision == "fp16")


def test_checkpointing_changes_nothing_but_memory(base, tmp_path):
    assert run(base, tmp_path / "plain", "--steps", "2") == 0
    assert run(base, tmp_path / "checkpointed", "--steps", "2", "--checkpointing") == 0
    plain, checkpointed = (load_file(tmp_path / name / "control.safetensors") for name in ("plain", "checkpointed"))
    for key in plain:
        torch.testing.assert_close(plain[key], checkpointed[key])


def test_accumulated_batches_are_averaged(base, tmp_path, monkeypatch):
    batches = []

    def loss_of_six(unet, control, schedule, z0, noise, t, context, hint):
        batches.append(len(z0))
        return sum(parameter.sum() for parameter in control.parameters()) * 0 + 6.0

    monkeypatch.setattr("controlnet.objective.control_loss", loss_of_six)
    assert run(base, tmp_path, "--steps", "1", "--accumulate", "3") == 0
    assert batches == [2, 2, 2]
    assert "loss 6.0000" in (tmp_path / "log.txt").read_text()


def test_a_run_can_be_resumed_at_another_rate(base, tmp_path):
    assert run(base, tmp_path, "--steps", "2", "--lr", "1e-3") == 0
    before = load_file(tmp_path / "control.safetensors")
    assert run(base, tmp_path, "--steps", "4", "--resume", "--lr", "1e-30") == 0
    after = load_file(tmp_path / "control.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_control_can_be_saved_in_half(base, tmp_path):
    assert run(base, tmp_path, "--steps", "1", "--save-dtype", "fp16") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "control.safetensors").values()} == {torch.float16}


def test_another_run_is_not_overwritten(base, tmp_path, capsys):
    assert run(base, tmp_path, "--steps", "2") == 0
    before = (tmp_path / "control.safetensors").read_bytes()
    assert run(base, tmp_path, "--steps", "2") == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert (tmp_path / "control.safetensors").read_bytes() == before


def test_there_must_be_something_to_resume(base, tmp_path, capsys):
    assert run(base, tmp_path / "nothing", "--resume") == 2
    assert "no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_a_missing_base_is_one_sentence(tmp_path, capsys):
    assert run(tmp_path / "none.safetensors", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "none.safetensors" in error and error.count("\n") == 1


def test_the_cosine_rate_falls_to_zero_and_the_constant_one_does_not(base, tmp_path):
    for name, rest in (("constant", 1e-3), ("cosine", 0.0)):
        assert run(base, tmp_path / name, "--steps", "2", "--rate", name, "--lr", "1e-3") == 0
        rate = torch.load(tmp_path / name / "state.pt", weights_only=True)["optimisation"]["rate"]
        assert rate["_last_lr"] == [pytest.approx(rest, abs=1e-9)]
