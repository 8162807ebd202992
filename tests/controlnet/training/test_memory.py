"""What a run will need, against what is known of its parts, what the same step really allocates, and what real runs
really take."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from small import SMALL
from torch import nn
from training_memory import write_comparison

from controlnet.model import ControlNet
from controlnet.objective import ControlLoss
from controlnet.training.lr_schedules import constant_schedule
from controlnet.training.memory import Memory, Prediction, table
from controlnet.training.optimisation import Optimisation
from controlnet.training.options import FULL_SIZE, TrainSettings
from controlnet.training.resolve import control_config
from controlnet.training.simulation import StorageCounter, bytes_of, casts_of
from ldm import StableDiffusion
from ldm.unet import set_checkpointing

SIZE = (64, 64)
ONE_LEVEL = replace(SMALL.unet, multipliers=(1,), attention=(False,), heads=(2,))  # attention in the middle alone
SHALLOW = replace(SMALL, unet=ONE_LEVEL)  # what is fake takes time by the layer, not by its size
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = {"precision": "fp16", "batch_size": 4, "accumulate": 2}


def prediction(config=SHALLOW, device=CUDA, world_size=1, validation=0, **settings) -> Prediction:
    settings = TrainSettings(**{**FULL_SIZE, "images": 1, "sample_count": 0, **settings})
    return Prediction(config, settings, SIZE, control_config(settings), device, world_size, validation)


@cache  # as what is fake takes time, too
def predicted(config=SHALLOW, batch_size=1, **settings) -> Memory:
    return prediction(config, **settings)(batch_size)


def resting(**settings) -> Memory:
    """What is there without a step."""
    return prediction(**settings).memory(0, 0)


def test_weights_gradients_and_moments_are_what_they_are():
    sd = StableDiffusion(SHALLOW)
    trained = sum(p.numel() for p in ControlNet.from_unet(sd.unet).parameters())
    unet = sum(p.numel() for p in sd.unet.parameters())
    encoders = sum(p.numel() for part in (sd.vae, sd.text_encoder) for p in part.parameters())
    full, half = predicted(), resting(precision="fp16", no_cache=True, ema=0.9)
    assert (full.trained, full.copy, full.gradients, full.optimizer) == (trained, 4 * trained, 4 * trained, 8 * trained)
    assert (full.base, full.encoders) == (4 * unet, 0) and full.images == 4 * encoders
    assert (half.base, half.encoders, half.copy) == (2 * unet, 2 * encoders, 8 * trained)
    assert full.counted == full.base + full.copy + full.optimizer + full.gradients + full.activations
    unlocked = resting(precision="fp16", sd_unlocked=True)
    assert unlocked.trained > full.trained and unlocked.gradients == 4 * unlocked.trained


def test_images_are_encoded_where_there_is_no_room_for_a_step():
    """Checkpointed steps of small networks hold less than the autoencoder does: when the cache is made, in batches of
    its own and before there are moments, and without a cache at every step."""
    wide = replace(SHALLOW, vae=replace(SHALLOW.vae, channels=64))  # the autoencoder's maps
    encoders = bytes_of(*(getattr(StableDiffusion(wide), name) for name in ("vae", "text_encoder")))
    cached, at_each_step = prediction(wide, images=None), prediction(wide, no_cache=True, checkpointing=True)
    memory, each = cached(1), max(at_each_step.encoding(2)) / 2  # nearly all is of the images
    assert memory.images + memory.optimizer == pytest.approx(encoders + 256 * each, rel=0.02)
    assert memory.counted == memory.base + memory.copy + memory.optimizer + memory.images
    encoding = at_each_step.encoding(at_each_step.encoded_at_once(4))
    assert at_each_step.memory(0, max(encoding)).images == pytest.approx(4 * each, rel=0.02)
    assert cached.encoded_at_once(4) == 256
    assert "encoding or decoding images" in table(memory) and "activations" not in table(memory)
    shown = prediction(wide, sample_count=1)
    assert shown.memory(0, 0).images == encoders + shown.decoding > encoders
    few, validation = prediction(wide, images=3), prediction(wide, images=3, validation=6)
    assert [few.encoded_at_once(8), *map(validation.encoded_at_once, (2, 4, 8))] == [3, 3, 4, 6]


def test_processes_share_the_moments_and_a_save_copies_them():
    """A GPU's copies go to the CPU's memory. On a CPU the main process keeps the moments that it has gathered, too."""
    plain, average = predicted(), resting(ema=0.9, device=CPU)
    shared = [resting(shard=True, world_size=4, device=device) for device in (CUDA, CPU)]
    assert [memory.optimizer for memory in shared] == [plain.optimizer // 4] * 2
    assert [memory.snapshot for memory in shared] == [0, plain.copy + plain.optimizer + 3 * plain.optimizer // 4]
    assert average.snapshot == 2 * plain.copy + plain.optimizer and "copy for a save" in table(average)
    lasting = average.base + average.encoders + average.copy + average.optimizer + average.snapshot
    assert average.counted == lasting + max(average.gradients + average.activations, average.images)
    unlocked = resting(sd_unlocked=True, device=CPU)
    assert unlocked.snapshot == 3 * unlocked.gradients and "copy for a save" not in table(plain)


def test_tf32_takes_what_fp32_takes():
    assert predicted(precision="tf32") == predicted()


def test_the_locked_half_computes_in_its_own_precision(monkeypatch):
    """As it does in a run: autocast would make its norms fp32, of which the decoder keeps the results."""
    half = predicted(**HALF)
    monkeypatch.setattr("controlnet.objective.own_precision", lambda *_: nullcontext())
    assert predicted.__wrapped__(**HALF).activations > 1.02 * half.activations


@pytest.mark.parametrize("checkpointing, before", [(False, False), (True, False), (True, True)])
def test_the_step_holds_what_the_real_one_holds(checkpointing, before):
    """The counter's figure for real tensors is that for fake ones, with and without gradients of a batch before."""
    sd = StableDiffusion(SHALLOW).requires_grad_(False)
    net = ControlNet.from_unet(sd.unet)
    for model in (sd.unet, net):
        set_checkpointing(model, checkpointing)
    loss = ControlLoss(sd.unet, net, sd.schedule)

    def step():
        z0, context = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, ONE_LEVEL.context_width)
        loss(z0, torch.zeros_like(z0), torch.zeros(2, dtype=torch.int64), context, torch.zeros(2, 3, 64, 64)).backward()

    if before:
        step()
    gradients = sum(p.nbytes for p in net.parameters()) if before else 0
    with StorageCounter() as counter:
        step()
    memory = predicted(batch_size=2, checkpointing=checkpointing, accumulate=2 if before else 1)
    assert memory.gradients + memory.activations == pytest.approx(gradients + counter.most, rel=0.02)


def test_gradients_that_last_are_there_beside_all_activations():
    accumulated, in_buckets = predicted(accumulate=2), predicted(world_size=2)
    assert accumulated.activations == in_buckets.activations > 1.5 * predicted().activations
    assert accumulated.gradients == in_buckets.gradients == predicted().gradients
    assert in_buckets.images == predicted().images + predicted().gradients == accumulated.images + predicted().gradients
    on_cpu = [predicted(device=CPU, batch_size=4, accumulate=batches).activations for batches in (1, 2)]
    assert on_cpu[0] == on_cpu[1]


def test_norms_and_enlarged_maps_are_fp32_under_cuda_s_autocast():
    x, norm = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), nn.GroupNorm(2, 4).to(torch.bfloat16)
    layer_norm = nn.LayerNorm(8).to(torch.bfloat16)
    functions = (norm, layer_norm, lambda x: F.interpolate(x, scale_factor=2))
    before = (F.group_norm, F.layer_norm, F.interpolate)
    for device, autocast, expected in (
        (CUDA, True, torch.float32),
        (CUDA, False, torch.bfloat16),  # as in the locked base, where it computes in its own dtype
    ):
        with casts_of(device), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert {function(x).dtype for function in functions} == {expected}
    with casts_of(CPU), torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert (F.group_norm, F.layer_norm, F.interpolate) == before
    assert predicted(**HALF).activations > 1.02 * predicted(device=CPU, **HALF).activations


def test_a_validation_pair_lies_on_the_device():
    latents, context, hint, t = 4 * 8 * 8 * 4, 77 * ONE_LEVEL.context_width * 2, 3 * 64 * 64 * 4, 8
    assert resting(precision="fp16", validation=5).validation == 5 * (2 * latents + context + hint + t)


def test_two_traces_tell_the_peak_of_every_batch_size():
    """The largest batch that fits is found from two simulated steps: its peak is that of a step simulated whole."""
    found = prediction(checkpointing=True)
    found.step, found.encoding = cache(found.step), cache(found.encoding)  # each batch is simulated once
    six = found(6)
    assert found.largest_batch(six.most) == (6, six)
    none, one = found.largest_batch(1)
    assert none == 0 and one == found(1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_works_in_place(optimizer):
    """So the prediction may leave out its temporaries: next to nothing, of Muon a few times the largest weight."""
    net = ControlNet.from_unet(StableDiffusion(SHALLOW).unet)
    named = list(net.named_parameters())
    optimisation = Optimisation(named, 1e-3, constant_schedule(1), CPU, "fp16", clip=1.0, optimizer=optimizer)
    for _ in range(2):  # the moments are made at the first
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        optimisation.scaler.scale(torch.zeros(()))
        with StorageCounter() as counter:
            optimisation.finish(optimisation.update())
    largest = max(parameter.nbytes for parameter in net.parameters())
    assert counter.most < (6 * largest if optimizer == "muon" else 0.05 * sum(p.nbytes for p in net.parameters()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_real_runs_take_what_was_predicted(tmp_path):
    """Within 10 %, with a save that is written meanwhile: with all that saves, and with all that costs."""
    runs = ["--batch-size 4 --accumulate 2 --checkpointing", "--batch-size 4 --no-cache --sd-unlocked"]
    process = forked.start(write_comparison, tmp_path, runs)
    process.join()
    assert process.exitcode == 0
    for options, (least, most, taken) in zip(runs, json.loads((tmp_path / "comparison.json").read_text()), strict=True):
        assert most < 1.2 * least and 0.9 * least < taken < 1.1 * most, options


def test_the_counter_sees_what_comes_and_goes():
    weight = torch.ones(50, 50)
    with StorageCounter() as counter:
        w = weight.t().detach()  # there before
        assert counter.now == 0 and w.shape == (50, 50)
        a = torch.zeros(1000)
        b = a.view(10, 100)  # the same storage
        c = b + 1
        assert counter.now == 8000
        del c
        assert counter.now == 4000
        del a, b
    assert (counter.now, counter.most) == (0, 8000)


def test_every_saving_saves():
    attentive = replace(SHALLOW, unet=replace(ONE_LEVEL, attention=(True,)))  # with more to compute again
    whole, checkpointed = (predicted(attentive, batch_size=4, device=CPU, checkpointing=on) for on in (False, True))
    assert checkpointed.activations < 0.9 * whole.activations
    full = predicted(device=CPU, batch_size=4, accumulate=1)
    assert predicted(device=CPU, **HALF).activations < 0.7 * full.activations
    assert resting(device=CPU, optimizer="adamw8bit").optimizer * 4 == full.optimizer
    muon = resting(device=CPU, optimizer="muon")
    assert 0.5 * full.optimizer < muon.optimizer < 0.6 * full.optimizer  # one moment, but for norms and biases


def test_every_item_is_told_in_gigabytes():
    estimates = {"context": (int(1e9), int(2e9)), "heap": (int(3e9), int(3e9))}
    text = table(Memory(*(int(x * 1e9) for x in (1, 2, 3, 4, 5, 6, 7, 8, 9)), estimates=estimates, trained=1))
    assert [line.split()[-2] for line in text.splitlines()[:8]] == [f"{i}.00" for i in range(1, 9)]
    *_, context, heap, together = (line.split(maxsplit=1)[1].strip() for line in text.splitlines())
    assert (context, heap) == ("1.00 to 2.00 GB (estimated)", "3.00 GB")
    assert together.endswith("40.00 to 41.00 GB (estimated)")
