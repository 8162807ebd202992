"""One optimizer step in every precision, and runs that are stopped and resumed."""

import copy
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from small import SMALLEST
from torch import nn
from torch.optim.swa_utils import AveragedModel

from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from controlnet.training.lr_schedules import constant_schedule
from controlnet.training.optimisation import Optimisation, update_ema
from controlnet.training.options import TrainSettings
from controlnet.training.prepare import prepare_process
from controlnet.training.run_state import DamagedState, read_state, restore, state_of, write_state
from ldm.schedule import Schedule
from ldm.unet import UNet

CPU = torch.device("cpu")


def save_state(path, step, **parts):
    write_state(path, state_of(step, parts))


def load_state(path, **parts):
    return restore(path, read_state(path), parts)


def regression(seed=0):
    """A small network and eight examples for it: (model, x, y)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3)), torch.randn(8, 5), torch.randn(8, 3)


def squared_error(model, x, y):
    return (model(x) - y).square().mean()


def optimise(model, lr=1e-2, lr_schedule=None, precision="fp32", clip=1.0, optimizer="adamw"):
    lr_schedule = lr_schedule or constant_schedule(warmup=0)
    return Optimisation(model.named_parameters(), lr, lr_schedule, CPU, precision, clip, optimizer)


def parameters_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradients_in(optimisation):
    """The gradients of the first step as AdamW got them: its first moment holds a tenth of them."""
    state = optimisation.optimizer.state_dict()["state"]
    return torch.cat([10 * values["exp_avg"].flatten() for values in state.values()])


# ------------------------------------------------------------------------------------------------------ a step


def test_two_half_batches_are_one_whole_batch():
    whole, x, y = regression()
    halves = copy.deepcopy(whole)
    optimisation, accumulating = optimise(whole), optimise(halves)
    for _ in range(3):
        optimisation.backward(squared_error(whole, x, y))
        norm = optimisation.finish(optimisation.update()).item()
        for half in (slice(0, 4), slice(4, 8)):
            accumulating.backward(squared_error(halves, x[half], y[half]) / 2)
        assert accumulating.finish(accumulating.update()).item() == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(parameters_of(halves), parameters_of(whole), rtol=1e-4, atol=1e-6)


def test_gradients_are_forgotten_after_a_step():
    model, x, y = regression()
    optimisation = optimise(model)
    optimisation.backward(squared_error(model, x, y))
    optimisation.finish(optimisation.update())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_long_gradients_are_clipped_and_short_ones_are_not(precision):
    """All together, not each parameter's on its own. The norm is the one before, without the scale of the loss."""
    for clip in (0.01, 100.0):
        model, x, y = regression()
        gradients = torch.autograd.grad(squared_error(model, x, y), model.parameters())
        want = torch.cat([gradient.flatten() for gradient in gradients])
        assert 0.01 < want.norm() < 100
        optimisation = optimise(model, precision=precision, clip=clip)
        optimisation.backward(squared_error(model, x, y))
        assert optimisation.finish(optimisation.update()).item() == pytest.approx(want.norm().item(), rel=1e-5)
        want = want * min(1, clip / want.norm().item())
        torch.testing.assert_close(gradients_in(optimisation), want, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------- learning rate


def test_each_step_has_its_own_rate():
    model, x, y = regression()
    optimisation = optimise(model, lr=0.1, lr_schedule=constant_schedule(4))
    used = []
    optimisation.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    for _ in range(5):
        optimisation.backward(squared_error(model, x, y))
        optimisation.finish(optimisation.update())
    assert used == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


# ----------------------------------------------------------------------------------------------------- precision


def small_training(precision="fp32", lr=1e-3):
    """A fresh ControlNet on a small random base: (control, optimisation, loss of step i), the same each time."""
    torch.manual_seed(0)
    unet = UNet(SMALLEST.unet).requires_grad_(False)
    control = ControlNet.from_unet(unet)
    schedule = Schedule(SMALLEST.schedule)

    def loss(step):
        generator = torch.Generator().manual_seed(step)
        z0, noise = torch.randn(2, 2, 4, 4, 4, generator=generator)
        context = torch.randn(2, 5, SMALLEST.unet.context_width, generator=generator)
        hint = torch.rand(2, 3, 32, 32, generator=generator)
        return ControlLoss(unet, control, schedule)(z0, noise, torch.tensor([600, 80]), context, hint)

    return control, optimise(control, lr, constant_schedule(warmup=3), precision), loss


def train(optimisation, loss, steps):
    losses = []
    for step in steps:
        with optimisation.autocast():
            value = loss(step)
        optimisation.backward(value)
        optimisation.finish(optimisation.update())
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_computes_in_half_and_keeps_fp32_parameters(precision, dtype):
    control, optimisation, loss = small_training(precision)
    seen = []
    control.zero_convs[3].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    before = parameters_of(control)
    losses = train(optimisation, loss, range(3))
    _, full_optimisation, full_loss = small_training("fp32")
    assert seen == [dtype] * 3
    assert losses == pytest.approx(train(full_optimisation, full_loss, range(3)), rel=0.02)
    assert parameters_of(control).dtype == torch.float32
    assert (parameters_of(control) - before).norm() > 0


def test_an_optimizer_that_makes_parameters_contiguous_does_not_undo_channels_last(monkeypatch):
    """As bitsandbytes does, which is not needed here."""

    class AdamW8bit(torch.optim.AdamW):
        def step(self):
            super().step()
            for p in self.param_groups[0]["params"]:
                p.data = p.data.contiguous()

    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=AdamW8bit))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3)).to(
        memory_format=torch.channels_last
    )
    optimisation = Optimisation(model.named_parameters(), 1e-2, constant_schedule(0), CPU, optimizer="adamw8bit")
    before = parameters_of(model)
    for _ in range(2):
        optimisation.backward(model(torch.ones(1, 3, 8, 8)).square().sum())
        optimisation.finish(optimisation.update())
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in model)
    assert not torch.equal(parameters_of(model), before)


def test_a_runs_settings_hold_the_precision_that_its_device_has(capsys):
    assert prepare_process(TrainSettings(precision="tf32"), CPU).precision == "fp32"
    assert "has no TF32" in capsys.readouterr().err
    assert prepare_process(TrainSettings(precision="bf16"), CPU).precision == "bf16"


def test_only_fp16_scales_its_losses():
    model, _, _ = regression()
    enabled = {
        precision: optimise(model, precision=precision).scaler.is_enabled() for precision in ("fp32", "fp16", "bf16")
    }
    assert enabled == {"fp32": False, "fp16": True, "bf16": False}


def test_fp16_gradients_do_not_vanish():
    """Gradients of 1e-9 are 0 in fp16, and are kept by the scale of the loss."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    optimisation = optimise(model, precision="fp16")
    with optimisation.autocast():
        output = model(torch.ones(1, 4))
    optimisation.backward((1e-9 * output.float()).sum())
    assert optimisation.finish(optimisation.update()).item() == pytest.approx(4e-9, rel=1e-2)


def test_a_step_that_overflows_changes_the_loss_scale_alone():
    model, x, y = regression()
    optimisation = optimise(model, precision="fp16")
    optimisation.backward(squared_error(model, x, y))
    optimisation.finish(optimisation.update())
    before, scale = parameters_of(model), optimisation.scaler.get_scale()
    moments = copy.deepcopy(optimisation.optimizer.state_dict()["state"])

    optimisation.backward(squared_error(model, x, y) * float("inf"))
    assert not math.isfinite(optimisation.finish(optimisation.update()))
    assert torch.equal(parameters_of(model), before)
    assert optimisation.scaler.get_scale() == scale / 2
    for i, values in optimisation.optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[name], moments[i][name]) for name in ("exp_avg", "exp_avg_sq", "step"))

    optimisation.backward(squared_error(model, x, y))
    assert math.isfinite(optimisation.finish(optimisation.update()))
    assert not torch.equal(parameters_of(model), before)


# ---------------------------------------------------------------------------------------------------- run state


def assert_same_state(a, b):
    """Two nested dictionaries, tensors bit by bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_same_state(one, other)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path, precision):
    control, optimisation, loss = small_training(precision)
    train(optimisation, loss, range(4))

    stopped, stopped_optimisation, stopped_loss = small_training(precision)
    train(stopped_optimisation, stopped_loss, range(2))
    save_state(tmp_path / "state.pt", 2, control=stopped, optimisation=stopped_optimisation)
    resumed, resumed_optimisation, resumed_loss = small_training(precision)
    step = load_state(tmp_path / "state.pt", control=resumed, optimisation=resumed_optimisation)
    assert step == 2
    assert_same_state(resumed_optimisation.state_dict(), stopped_optimisation.state_dict())
    train(resumed_optimisation, resumed_loss, range(step, 4))

    assert torch.equal(parameters_of(resumed), parameters_of(control))
    assert_same_state(resumed_optimisation.state_dict(), optimisation.state_dict())


def test_the_loss_scale_is_resumed(tmp_path):
    model, x, y = regression()
    optimisation = optimise(model, precision="fp16")
    for factor in (1, float("inf"), float("inf")):
        optimisation.backward(squared_error(model, x, y) * factor)
        optimisation.finish(optimisation.update())
    save_state(tmp_path / "state.pt", 3, optimisation=optimisation)
    fresh = optimise(regression()[0], precision="fp16")
    assert fresh.scaler.get_scale() != optimisation.scaler.get_scale()
    load_state(tmp_path / "state.pt", optimisation=fresh)
    assert fresh.scaler.get_scale() == optimisation.scaler.get_scale()


def test_the_state_of_another_kind_of_run_is_refused(tmp_path):
    model, _, _ = regression()
    save_state(tmp_path / "state.pt", 1, unet=model, ema=model)
    before = parameters_of(model)
    with pytest.raises(ValueError) as caught:
        load_state(tmp_path / "state.pt", unet=model)
    message = str(caught.value)
    assert "\n" not in message and message.count(". ") == 0
    assert str(tmp_path / "state.pt") in message and "'ema'" in message
    assert torch.equal(parameters_of(model), before)


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    model, _, _ = regression()
    save_state(path, 7, model=model)
    saved = parameters_of(model)

    def fail(state, file):
        file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="no space left"):
            save_state(path, 8, model=regression(seed=1)[0])
    other, _, _ = regression(seed=2)
    assert load_state(path, model=other) == 7
    assert torch.equal(parameters_of(other), saved)
    save_state(path, 9, model=model)  # what the failure left behind is in nobody's way
    assert load_state(path, model=other) == 9
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_damaged_state_or_one_of_another_base_is_one_sentence(tmp_path):
    path = tmp_path / "state.pt"
    model, *_ = regression()
    save_state(path, 3, model=model)
    with pytest.raises(ValueError, match="the model in .* does not fit"):
        load_state(path, model=nn.Linear(2, 2))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no state at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_state(path, model=model)


def test_no_bit_of_a_state_changes_without_notice(tmp_path):
    path = tmp_path / "state.pt"
    model, *_ = regression()
    save_state(path, 3, model=model)
    whole, wanted, noticed = path.read_bytes(), parameters_of(model), 0
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        other, *_ = regression(seed=1)
        try:
            load_state(path, model=other)
        except DamagedState:
            noticed += 1
        else:  # between the records, where nothing reads it
            assert torch.equal(parameters_of(other), wanted), at
    assert noticed > 100


def test_no_memory_and_no_permission_are_no_damage(tmp_path, monkeypatch):
    """A whole state must not be left for the one before."""
    path = tmp_path / "state.pt"
    model, *_ = regression()
    save_state(path, 3, model=model)
    for error in (RuntimeError("can't allocate memory"), MemoryError(), PermissionError(13, "denied")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fail)
        with pytest.raises(type(error)) as caught:
            load_state(path, model=model)
        assert not isinstance(caught.value, ValueError)


def test_a_run_is_not_resumed_in_another_precision(tmp_path):
    path = tmp_path / "state.pt"
    model, *_ = regression()
    save_state(path, 3, optimisation=optimise(model))
    with pytest.raises(ValueError, match="precision"):
        load_state(path, optimisation=optimise(model, precision="fp16"))


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("adamw", "bf16"), ("muon", "fp32")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(optimizer, precision):
    model, x, y = regression()
    optimisation, before = optimise(model, precision=precision, optimizer=optimizer), parameters_of(model)
    optimisation.backward(squared_error(model, x * math.nan, y))
    assert math.isnan(optimisation.finish(optimisation.update()))
    assert torch.equal(parameters_of(model), before)
    for _ in range(2):  # a step's norm is looked at in the next one
        optimisation.backward(squared_error(model, x, y))
        optimisation.finish(optimisation.update())
    assert not torch.equal(parameters_of(model), before) and parameters_of(model).isfinite().all()
    assert optimisation.skipped_in_a_row == 0


def test_many_skipped_steps_stop_the_run_with_the_layers_name():
    model, x, y = regression()
    optimisation, before = Optimisation(model.named_parameters(), 1e-2, constant_schedule(0), CPU), parameters_of(model)
    model[0].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="20 steps in a row .*0.weight"):
        for _ in range(22):
            optimisation.backward(squared_error(model, x, y))
            optimisation.finish(optimisation.update())
    assert torch.equal(parameters_of(model), before) and optimisation.skipped_in_a_row == 20


def test_a_run_that_recovers_in_time_goes_on():
    model, x, y = regression()
    optimisation, before = optimise(model), parameters_of(model)
    for factor in [math.inf] * 20 + [1] * 2:
        optimisation.backward(squared_error(model, x, y) * factor)
        optimisation.finish(optimisation.update())
    assert optimisation.skipped_in_a_row == 0 and not torch.equal(parameters_of(model), before)


def test_a_loss_that_is_not_finite_is_called_that():
    model, x, y = regression()
    optimisation = Optimisation(model.named_parameters(), 1e-2, constant_schedule(0), CPU)
    with pytest.raises(FloatingPointError, match="the loss is not"):
        for _ in range(22):
            optimisation.backward(squared_error(model, x, y) * math.nan)
            optimisation.finish(optimisation.update())


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_an_average_warms_up(decay):
    """After n updates it keeps (1 + n) / (10 + n) at most: one of a short run is not what the weights were at first."""
    model = nn.Linear(1, 1, bias=False)
    average = AveragedModel(model)
    expected = None
    for n in range(40):
        value = math.sin(n)
        nn.init.constant_(model.weight, value)
        update_ema(average, model, decay)
        kept = 0 if n == 0 else min(decay, (1 + n) / (10 + n))
        expected = value if n == 0 else kept * expected + (1 - kept) * value
        assert average.module.weight.item() == pytest.approx(expected, abs=1e-6)
