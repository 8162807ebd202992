"""Trains a ControlNet (arXiv 2302.05543) on a locked Stable Diffusion.

    python train.py --data fill50k                     # the small base of weights/: minutes on a laptop
    python train.py --recipe tile --data my/photographs     # or inpaint, shuffle, or ip2p, which learns from pairs
    python train.py --base sd15 --data my/pairs --precision fp16 --checkpointing --batch-size 4
    torchrun --nproc_per_node=4 train.py ...           # each batch four times as large; --shard takes less memory
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=4 train.py ...       # on each of two machines
    python train.py ... --dry-run                      # what it would train, in how much memory and disk

The run's folder gets settings.json, log.jsonl, report.html with curves and grids of validation hints (samples/), the
last few ControlNets and the best one for infer.py and other programs, control.safetensors being the newest, and state/,
from which `--resume` goes on exactly where a run was stopped, in whatever way. With several machines the first one has
that folder, and each encodes the latents missing on its own disk. What torchrun starts again (--max-restarts) goes on
by itself.
"""

import sys

from controlnet.common.program import share_cores, stop_quietly
from controlnet.training.options import TrainSettings, parse_args

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds: --help and mistakes answer at once
    share_cores()
    stop_quietly()
    parse_args(__doc__)

import signal
import time
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from controlnet.ablations import only_middle, start_as
from controlnet.common.devices import PRECISIONS, peak_memory
from controlnet.common.program import note
from controlnet.common.program import run as run_program
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss, Draws, loss_inputs
from controlnet.training.data import TrainingData
from controlnet.training.distributed import Process, join_processes
from controlnet.training.dry_run import plan
from controlnet.training.example import example_of, infer_command
from controlnet.training.interruptions import Signals, lasting_output
from controlnet.training.intervals import Interval
from controlnet.training.latent_cache import ends_of_weights
from controlnet.training.later import Later
from controlnet.training.optimisation import Optimisation, update_ema
from controlnet.training.prepare import keep_memory_in_the_loop, prepare_networks, prepare_process
from controlnet.training.previews import own_samples
from controlnet.training.progress import Progress
from controlnet.training.resolve import check_hint_channels, control_config, resolve
from controlnet.training.run_state import Position, RunFolder, restore, state_of
from controlnet.training.saving import Writer, on_cpu, with_weights
from controlnet.training.step import Step
from controlnet.training.validation import Validation
from controlnet.training.workers import worker_ended
from ldm import StableDiffusion
from ldm.unet import UNet


def train(settings: TrainSettings, process: Process, signals: Signals) -> int:
    """-> the exit status: 0 if all steps are done, else that of the signal which stopped the run after a step."""
    settings = prepare_process(settings, process.device)
    training = Training(settings, process)
    start = training.restore()
    training.open_data(start)
    training.open_loop()

    progress = Progress(training.run, settings, start) if process.is_main else None
    stopping = False
    with signals.waiting(), progress or nullcontext(), training.writer:
        if start >= settings.steps:
            if process.is_main:
                print(f"all {start} steps are done: raise --steps to train further")
            training.save(start, progress)
        for step in range(start, settings.steps):
            training.writer.check()
            values, pending = training.step()
            done = step + 1
            last = done == settings.steps
            # The main process's clock decides for all.
            saving = signals.pop_save_request() or (process.is_main and training.saves.due(done))
            stopping, saving = process.any(signals.received is not None and not last, saving)
            if process.is_main:
                progress.log({"step": done, **values, **training.validate(done, saving, last)}, pending)
            if saving or last or stopping:
                training.save(done, progress)
            if stopping:
                break
    process.leave()
    if stopping:
        if process.is_main:
            note(f"\nsaved after step {done}: go on with --resume --out {settings.out}")
        return 128 + (signals.received or signal.SIGTERM)
    if process.is_main:
        print(f"{training.run.report} shows how it went, and the ControlNet is {training.run.control}: try it with")
        print(infer_command(settings, training.run, training.example))
    return 0


class Training:
    """One run: the locked base and its trainable copy, the optimizer, the data and the position in it."""

    def __init__(self, settings: TrainSettings, process: Process):
        self.settings, self.process = settings, process
        self.run, self.writer = RunFolder(settings.out), Writer()
        torch.manual_seed(settings.seed)

        # Load the base, in fp32, with its LoRAs merged, and copy its encoder: the trainable copy stays in fp32.
        given = dict(prediction=settings.prediction, zero_snr=settings.zero_snr, vae=settings.vae, loras=settings.lora)
        self.sd = StableDiffusion.load(settings.base, **given)
        self.unet_fingerprint = ends_of_weights(self.sd.unet)
        # To be saved as it is here: below it is cast to the precision of the computation.
        self.base = self.sd.state_dict() if settings.sd_unlocked else {}
        self.control = new_control(self.sd.unet, settings, self.run).to(process.device)

        # Lock the base, in the dtype of the computation. Its decoder is trained only if --sd-unlocked says so.
        unet, dtype = self.sd.unet, PRECISIONS[settings.precision]
        for network in (unet.encoder, unet.decoder, self.sd.vae, self.sd.text_encoder):
            trained = settings.sd_unlocked and network is unet.decoder
            network.requires_grad_(trained).to(process.device, torch.float32 if trained else dtype)
        prepare_networks(self.sd, self.control, settings, process.device)
        self.sd.schedule = self.sd.schedule.to(process.device)

        # The loss and its optimizer: what requires gradients is trained, and nothing else.
        self.loss = ControlLoss(self.sd.unet, self.control, self.sd.schedule, settings.min_snr)
        if settings.compile:
            self.loss.compile()
        self.wrapped_loss = process.wrap_ddp(self.loss)
        trained = [(name, parameter) for name, parameter in self.loss.named_parameters() if parameter.requires_grad]
        self.optimisation = Optimisation.from_settings(trained, settings, process.device)

        # Where the run stands. A step depends on nothing but these and the settings: there is no random state.
        self.position = Position()
        self.parts = {"control": self.control, "optimisation": self.optimisation, "position": self.position}
        if settings.sd_unlocked:
            self.parts["decoder"] = self.sd.unet.decoder
        # What is saved, validated and shown in the grids: the copy or its average. Validation weights all timesteps
        # alike, so that runs can be compared, also before and after a change of --min-snr.
        self.average, shown = None, self.control
        if settings.ema:
            self.average = self.parts["average"] = AveragedModel(self.control)
            shown = self.average.module
        self.shown_loss = ControlLoss(self.sd.unet, shown, self.sd.schedule)

    def restore(self) -> int:
        """-> how many steps are done: none in a new run."""
        found = self.process.from_main(self.run.newest_state) if self.settings.resume else None
        return restore(*found, self.parts) if found else 0

    def open_data(self, start: int) -> None:
        """Images and captions become latents and text states: all of them here and now, unless --no-cache. Data
        that do not fit this run, or the one that is resumed, are refused before that."""
        settings, sd = self.settings, self.sd
        self.data = TrainingData(settings, sd, self.process)
        self.draws = Draws(self.data.latent_shape, sd.schedule.config.timesteps, settings.prompt_dropout, settings.seed)
        if self.process.is_main:
            own = own_samples(settings, self.data.size)
            self.run.begin(start, settings, self.data.fingerprint | {"UNet": self.unet_fingerprint})
        if not settings.no_cache:
            self.data.compute_latents()
        self.batches = self.data.batches(self.position.seen)
        if self.process.is_main:
            pairs = self.data.validation_samples()
            samples = pairs or self.data.first_samples(max(settings.sample_count, 1))
            shown = samples[: settings.sample_count] + own
            self.validation = Validation(sd, pairs, shown, self.draws, self.data.empty_prompt, settings)
            self.example = example_of(settings, self.run, samples[0])
        if not settings.no_cache:
            for encoder in (sd.vae, sd.text_encoder):
                encoder.cpu()  # only the grids need them now

    def open_loop(self) -> None:
        """The step, of the optimizer as it is restored, and the clocks."""
        accumulate, record = self.settings.accumulate, not self.settings.compile
        self.take_step = Step(self.wrapped_loss, self.optimisation, self.process, accumulate, record)
        keep_memory_in_the_loop(self.process.device)
        self.saves, self.clock = Interval(self.settings.save_every), time.perf_counter()

    def step(self) -> tuple[dict, Later]:
        """One optimizer step, from the gradients of one batch or, accumulated, of a few -> what is logged of it; loss
        and gradient may still be computed by the device."""
        values = {"lr": self.optimisation.current_lr}
        pending = Later(*self.take_step(self.next_inputs))
        if self.average:
            update_ema(self.average, self.control, self.settings.ema)
        self.position.seen += self.data.samples_per_step
        # Wall-clock time: waiting for data counts, and so do the grids and saves since the step before.
        before, self.clock = self.clock, time.perf_counter()
        values["images_per_second"] = self.data.samples_per_step / (self.clock - before)
        return values | {"bad": len(self.data.bad)} | peak_memory(self.process.device), pending

    def next_inputs(self) -> tuple[Tensor, ...]:
        """The loss's inputs: a batch, and the timesteps, noise and dropped prompts that are drawn for it."""
        batch = next(self.batches)
        # With buckets each batch has a size of its own.
        drawn = self.draws(batch.positions.tolist(), batch.content.mean.shape[1:])
        scale, empty_prompt = self.sd.vae.config.scale, self.data.empty_prompt
        return loss_inputs(batch.content, batch.hint, drawn, scale, empty_prompt, self.process.device)

    def validate(self, done: int, saving: bool, last: bool) -> dict:
        """Now and then the loss on validation pairs and a grid of images -> what is logged after `done` steps."""
        with self.optimisation.autocast():  # needed: the base is in half precision, the ControlNet in fp32
            return self.validation(done, self.shown_loss, saving, last)

    def save(self, step: int, progress: Progress | None) -> None:
        """Copies everything as it is after `step`; a thread of the main process writes it while training goes on."""
        self.optimisation.gather()
        if self.process.is_main:
            progress.flush()
            best = self.position.is_best(progress.curves.at("validation_loss", step))
            self.writer.wait()  # before the copy: two at once would take twice the memory
            self.writer.start(self.write, on_cpu(state_of(step, self.parts), self.process.device), best)

    def write(self, state: dict, best: bool) -> None:
        dtype = PRECISIONS[self.settings.save_dtype]
        if self.average:
            shown = with_weights(self.average, state["average"]).module
        else:
            shown = with_weights(self.control, state["control"])
        shown.save(self.run.control_at(state["step"]), dtype)
        if self.settings.sd_unlocked:
            decoder = {f"unet.decoder.{name}": weight for name, weight in state["decoder"].items()}
            with_weights(self.sd, self.base | decoder).save(self.run.base, dtype)
        self.run.save(state, self.settings.keep, best)


def new_control(unet: UNet, settings: TrainSettings, run: RunFolder) -> ControlNet:
    """The ControlNet to train: a copy of the UNet's encoder, one of the baselines to compare with, or --control, whose
    file is no longer needed on resume."""
    if settings.control is not None:
        source = run.control if settings.resume and run.states() and run.control.exists() else settings.control
        pooling = True if settings.global_average_pooling else None  # otherwise the file tells
        control = ControlNet.load(source, unet, dtype=torch.float32, global_average_pooling=pooling)
        control.train().requires_grad_(True)
        check_hint_channels(control.config, settings)
    else:
        control = ControlNet.from_unet(unet, control_config(settings))
    start_as(control, settings.architecture)
    if settings.only_mid_control:
        only_middle(control)
    return control


def supervised(given: dict) -> int:
    """Runs `train` with the run's folder to itself; whoever reads its output may go away -> the exit status."""
    process = join_processes(given.get("device"))
    settings = process.from_main(lambda: resolve(given))
    run = RunFolder(settings.out)
    alone = run.taken(settings.resume) if process.is_main else nullcontext()
    with lasting_output(), alone, Signals() as signals:
        try:
            return train(settings, process, signals)
        except KeyboardInterrupt:
            if process.is_main:
                note(f"\ntrain.py: stopped at once: {run.how_to_go_on()}")
            return 128 + signals.received
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise ValueError(worker_ended(error)) from error


def main(argv: list[str] | None = None) -> int:
    given = parse_args(__doc__, argv)

    def work() -> int:
        if not given.get("dry_run"):
            return supervised(given)
        print(plan(resolve(given)))
        return 0

    return run_program(
        "train.py",
        work,
        given.get("debug", False),
        memory_advice="add --checkpointing or --precision fp16, or take a smaller --batch-size, with more --accumulate "
        "for as many images a step (--dry-run --fit GB tells what fits); what was saved is intact",
        disk_advice="make room, or give another folder as --out (for latents: --cache); what was saved is intact",
    )


if __name__ == "__main__":
    sys.exit(main())
