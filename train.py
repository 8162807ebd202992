"""Trains a ControlNet (arXiv 2302.05543) on a locked Stable Diffusion.

    python train.py --data fill50k                     # the small base of weights/: minutes on a laptop
    python train.py --base sd15 --data my/pairs --precision fp16 --checkpointing --batch-size 4
    torchrun --nproc_per_node=4 train.py ...           # each batch four times as large
    python train.py ... --dry-run                      # what it would train, and in how much memory

The run's folder gets settings.json, log.jsonl, grids of validation hints in samples/, control.safetensors for infer.py
and other programs, and state/, from which `--resume` goes on exactly where a run was stopped, in whatever way.
"""

import sys

from controlnet.common.program import share_cores
from controlnet.training.options import TrainSettings, parse_args

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds: --help and mistakes answer at once
    share_cores()
    parse_args(__doc__)

import signal
import time
from contextlib import nullcontext

import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from controlnet.ablations import only_middle, start_as_gaussian
from controlnet.common.devices import PRECISIONS, peak_memory, temporarily_on
from controlnet.common.program import note
from controlnet.common.program import run as run_program
from controlnet.model import ControlNet
from controlnet.objective import ControlLoss, Draws, loss_inputs, zero_conv_norms
from controlnet.training.data import TrainingData, worker_ended
from controlnet.training.distributed import Process, join_processes
from controlnet.training.dry_run import plan
from controlnet.training.interruptions import Signals, lasting_output
from controlnet.training.latent_cache import ends_of_weights
from controlnet.training.optimisation import Optimisation, warmed_up_ema
from controlnet.training.prepare import keep_memory_in_the_loop, prepare_networks, prepare_process
from controlnet.training.resolve import check_hint_channels, control_config, resolve
from controlnet.training.run_state import Position, Progress, RunFolder
from controlnet.training.validation import Preview, ValidationLoss
from controlnet.worlds import EXAMPLE_OF
from ldm import StableDiffusion
from ldm.unet import UNet


def train(settings: TrainSettings, process: Process, signals: Signals) -> int:
    """-> the exit status: 0 if all steps are done, else that of the signal which stopped the run after a step."""
    prepare_process(settings)
    training = Training(settings, process)
    start = training.restore()
    training.open_data(start)

    if start >= settings.steps and process.is_main:
        print(f"all {start} steps are done: raise --steps to train further")
        training.save(start)
    steps = range(start, settings.steps)
    bar = tqdm(steps, "train", settings.steps, initial=start, mininterval=1, disable=not process.is_main)
    progress = Progress(training.run, bar, settings.tensorboard) if process.is_main else None
    stopping = False
    with signals.waiting(), bar:
        for step in bar:
            done, last = step + 1, step + 1 == settings.steps
            values = {"step": done, **training.step()}
            stopping = process.any(signals.received is not None)
            if process.is_main:
                progress.log(values | training.validate(done, last))
                if done % settings.save_every == 0 or last or stopping or signals.take_save_asked():
                    training.save(done)
            if stopping:
                break
    process.leave()
    if stopping:
        if process.is_main:
            note(f"\nsaved after step {done}: go on with --resume --out {settings.out}")
        return 128 + (signals.received or signal.SIGTERM)
    if process.is_main:
        print(f"the ControlNet is {training.run.control}: try it with")
        loras, hint = "".join(f" --lora {lora}" for lora in settings.lora), EXAMPLE_OF.get(settings.data)
        base = training.run.base if settings.sd_unlocked else f"{settings.base}{loras}"
        print(f"python infer.py --base {base} --hint {hint or 'HINT.png'} --control {training.run.control}")
    return 0


class Training:
    """One run: the locked base and its trainable copy, the optimizer, the data and the position in it."""

    def __init__(self, settings: TrainSettings, process: Process):
        self.settings, self.process, self.run = settings, process, RunFolder(settings.out)
        torch.manual_seed(settings.seed)

        # Load the base, in fp32, with its LoRAs merged, and copy its encoder: the trainable copy stays in fp32.
        self.sd = StableDiffusion.load(settings.base, prediction=settings.prediction, loras=settings.lora)
        self.unet_fingerprint = ends_of_weights(self.sd.unet)
        self.control = new_control(self.sd.unet, settings, self.run).to(process.device)

        # Lock the base, in the dtype of the computation. Its decoder is trained only if --sd-unlocked says so.
        unet, dtype = self.sd.unet, PRECISIONS[settings.precision]
        for network in (unet.encoder, unet.decoder, self.sd.vae, self.sd.text_encoder):
            trained = settings.sd_unlocked and network is unet.decoder
            network.requires_grad_(trained).to(process.device, torch.float32 if trained else dtype)
        prepare_networks(self.sd, self.control, settings, process.device)

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
        self.average = None
        if settings.sd_unlocked:
            self.parts["decoder"] = self.sd.unet.decoder
        if settings.ema:
            self.average = AveragedModel(self.control, multi_avg_fn=warmed_up_ema(settings.ema))
            self.parts["average"] = self.average

    def restore(self) -> int:
        """-> how many steps are done: none in a new run."""
        return self.run.load(**self.parts) if self.settings.resume else 0

    def open_data(self, start: int) -> None:
        """Images and captions become latents and text states: all of them here and now, unless --no-cache. Mismatches
        are found first."""
        settings, sd = self.settings, self.sd
        self.data = TrainingData(settings, sd, self.process)
        self.draws = Draws(self.data.latent_shape, sd.schedule.config.timesteps, settings.prompt_dropout, settings.seed)
        if self.process.is_main:
            self.run.begin(start, settings, self.data.fingerprint | {"UNet": self.unet_fingerprint})
        if not settings.no_cache:
            self.data.compute_latents()
        self.batches = self.data.batches(self.position.seen)
        if self.process.is_main:
            self.validation_loss, self.preview = validation_of(sd, self.data, self.draws, settings)
        if not settings.no_cache:
            for encoder in (sd.vae, sd.text_encoder):
                encoder.cpu()  # only the grids need them now
        keep_memory_in_the_loop(self.process.device)

    def step(self) -> dict:
        """One optimizer step, from the gradients of one batch or, accumulated, of a few -> what is logged of it."""
        began, total, count = time.perf_counter(), 0.0, self.settings.accumulate
        for i in range(count):
            batch = next(self.batches)
            drawn = self.draws(batch.positions.tolist())  # timesteps, noise, dropped prompts
            inputs = loss_inputs(
                batch.content,
                batch.hint,
                drawn,
                self.sd.vae.config.scale,
                self.data.empty_prompt,
                self.process.device,
            )
            with self.process.accumulating(self.wrapped_loss, last=i == count - 1):
                with self.optimisation.autocast():
                    loss = self.wrapped_loss(*inputs) / count
                self.optimisation.backward(loss)
            total += loss.detach()
        values = {"loss": self.process.mean(float(total)), "lr": self.optimisation.current_lr}
        values["gradient"] = self.optimisation.step()
        if self.average:
            self.average.update_parameters(self.control)
        self.position.seen += self.data.samples_per_step
        values["images_per_second"] = self.data.samples_per_step / (time.perf_counter() - began)
        memory = peak_memory(self.process.device)
        return values | {"skipped": self.optimisation.skipped, "bad": len(self.data.bad), "memory_gb": memory}

    def validate(self, done: int, last: bool) -> dict:
        """Now and then the loss on validation pairs and a grid of images -> what is logged after `done` steps."""
        values = {}
        with self.optimisation.autocast():  # needed: the base is in half precision, the ControlNet in fp32
            if self.validation_loss and (done % self.settings.validate_every == 0 or last):
                values["validation_loss"] = self.validation_loss(self.shown_loss)
                values["zero_convs"] = zero_conv_norms(self.shown)
            if self.preview and (done % self.settings.sample_every == 0 or last):
                with temporarily_on(self.process.device, self.sd.vae, self.sd.text_encoder):
                    try:
                        values |= self.preview.save(self.shown, self.run.grid(done))
                    except FloatingPointError as error:  # half precision may overflow: no reason to end the run
                        note(f"there is no grid of step {done}: {error}")
        return values

    def save(self, step: int) -> None:
        dtype = PRECISIONS[self.settings.save_dtype]
        self.shown.save(self.run.control, dtype)
        if self.settings.sd_unlocked:
            self.sd.save(self.run.base, dtype)
        # Last: a run that is killed before this resumes from the previous state.
        self.run.save(step, self.settings.keep, **self.parts)

    @property
    def shown(self) -> ControlNet:
        """What is saved, validated and shown in the grids."""
        return self.average.module if self.average else self.control

    @property
    def shown_loss(self) -> ControlLoss:
        if self.average is None:
            return self.loss
        return ControlLoss(self.sd.unet, self.shown, self.sd.schedule, self.settings.min_snr)


def new_control(unet: UNet, settings: TrainSettings, run: RunFolder) -> ControlNet:
    """The ControlNet to train: a copy of the UNet's encoder, one of the paper's ablations, or --control, whose file is
    no longer needed on resume."""
    if settings.control:
        source = run.control if settings.resume and run.states() and run.control.exists() else settings.control
        control = ControlNet.load(source, unet, dtype=torch.float32).train().requires_grad_(True)
        check_hint_channels(control.config, settings)
    else:
        control = ControlNet.from_unet(unet, control_config(settings))
    if settings.architecture == "gaussian":
        start_as_gaussian(control)
    if settings.only_mid_control:
        only_middle(control)
    return control


def validation_of(
    sd: StableDiffusion, data: TrainingData, draws: Draws, settings: TrainSettings
) -> tuple[ValidationLoss | None, Preview | None]:
    """The validation loss and the grids, as far as there is something to show."""
    samples, count = data.validation_samples(), settings.sample_count
    if samples:
        preview = Preview(sd, samples[:count]) if count else None
        return ValidationLoss(sd, samples, draws, data.empty_prompt, settings.batch_size), preview
    print("there are no validation pairs: no validation loss, and the grids show images that are trained on")
    trained_on = data.first_samples(count)
    return None, Preview(sd, trained_on) if trained_on else None


def supervised(settings: TrainSettings) -> int:
    """`train`, the only process in the run's folder, which a closed pipe does not stop -> the exit status."""
    process, run = join_processes(settings.device), RunFolder(settings.out)
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
        settings = resolve(given)
        if not settings.dry_run:
            return supervised(settings)
        print(plan(settings))
        return 0

    return run_program(
        "train.py",
        work,
        given.get("debug", False),
        memory_advice="take a smaller --batch-size with more --accumulate, or add --checkpointing or --precision fp16 "
        "(--dry-run tells how much each needs); what was saved is intact",
        disk_advice="make room, or give another folder as --out (for latents: --cache); what was saved is intact",
    )


if __name__ == "__main__":
    sys.exit(main())
