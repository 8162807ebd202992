"""Trains a ControlNet (arXiv 2302.05543) on a locked Stable Diffusion.

    python train.py --data fill50k                     # the small base of weights/: minutes on a laptop
    python train.py --base sd15 --data my/pairs --precision fp16 --checkpointing --batch-size 4
    torchrun --nproc_per_node=4 train.py ...           # each batch four times as large
    python train.py ... --dry-run                      # what it would train, and in how much memory

The run's folder gets settings.json, log.jsonl, grids of held-out hints in samples/, control.safetensors for infer.py
and other programs, and state/, from which `--resume` goes on exactly where a run was stopped, in whatever way.
"""

import argparse
import os
import sys
import time

from controlnet.training.options import make_parser, settled


def train(args: argparse.Namespace) -> int:
    """-> the exit status: 0 if all steps are done, else that of the signal which stopped the run after a step."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from tqdm import tqdm

    from controlnet.common.devices import PRECISIONS, borrowed, keep_freed_memory, peak_memory
    from controlnet.objective import ControlLoss, only_middle, zero_conv_norms
    from controlnet.training.distributed import join_processes
    from controlnet.training.optimisation import Optimisation, constant_rate, cosine_rate
    from controlnet.training.run_state import Position, Progress, RunFolder, StopSignals
    from controlnet.training.training_data import DataSettings, TrainingData
    from controlnet.worlds import EXAMPLE_OF
    from ldm import StableDiffusion
    from ldm.fast.onednn import quicken
    from ldm.fast.packed import pack
    from ldm.unet import set_checkpointing

    run = RunFolder(args.out)
    processes = join_processes(args.device)
    device, dtype = processes.device, PRECISIONS[args.precision]
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)

    # --- the locked base, in half precision where the computation is, and the trainable copy in fp32
    torch.manual_seed(args.seed)
    sd = StableDiffusion.load(args.base, device, dtype, args.prediction)
    control = new_control(sd, args)
    for model in (sd, control):
        model.to(memory_format=torch.channels_last)  # the faster layout for convolutions
        set_checkpointing(model, args.checkpointing)
    if args.only_mid_control:
        only_middle(control)
    if args.sd_unlocked:
        sd.unet.decoder.float().requires_grad_(True)
    pack(sd.vae, sd.text_encoder)
    if not args.compile:  # torch.compile cannot look into what follows
        pack(sd.unet.encoder)  # not the decoder, which gradients come back through
        if (device.type, args.precision) == ("cpu", "fp32"):
            quicken(sd.unet.decoder, control)

    # --- the loss as a module, and its optimiser
    loss = ControlLoss(sd.unet, control, sd.schedule, args.min_snr)
    if args.compile:
        loss.compile()
    joined = processes.joined(loss)
    trained = [(name, parameter) for name, parameter in loss.named_parameters() if parameter.requires_grad]
    rate = cosine_rate(args.warmup, args.steps) if args.rate == "cosine" else constant_rate(args.warmup)
    optimisation = Optimisation(trained, args.lr, rate, device, args.precision, args.clip, args.optimizer)

    # --- where the run stands: a step depends on nothing but this and the settings
    position = Position()
    parts = {"control": control, "optimisation": optimisation, "position": position}
    shown = control  # what is saved, and what the grids show
    if args.sd_unlocked:
        parts["decoder"] = sd.unet.decoder
    if args.ema:
        parts["average"] = AveragedModel(control, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        shown = parts["average"].module
    start = run.load(**parts) if args.resume else 0

    # --- pictures become latents, once; then previews alone need the autoencoder and the text encoder
    cache = None if args.no_cache else args.cache or args.out / "cache"
    data = TrainingData(DataSettings.from_args(args), sd, processes, cache)
    batches = data.batches(position.seen)
    if not args.no_cache:  # loaded anew they wait for that in their file, as far as it has the precision, not in memory
        waiting = StableDiffusion.load(args.base, "cpu", dtype, args.prediction)
        sd.vae, sd.text_encoder = waiting.vae, waiting.text_encoder
        del waiting
    keep_freed_memory(device, large=True)  # not before: the autoencoder's maps would leave holes
    if processes.first:
        run.begin(start, vars(args), data.fingerprint)

    def save(step: int) -> None:
        shown.save(run.control, PRECISIONS[args.save_dtype])
        if args.sd_unlocked:
            sd.save(run.base, PRECISIONS[args.save_dtype])
        run.save(step, args.keep, **parts)  # the last: a run that is killed before it comes here does the steps again

    if start >= args.steps and processes.first:
        print(f"all steps are done, {start} by now: to go on give more of them as --steps")
        save(start)
    bar = tqdm(range(start, args.steps), "train", args.steps, initial=start, mininterval=1, disable=not processes.first)
    progress = Progress(run, bar, args.tensorboard) if processes.first else None
    with StopSignals() as stop, bar:
        for step in bar:
            # --- one step: the loss of a few batches. Noise, timestep and dropped prompts are each sample's own
            began, total = time.perf_counter(), 0.0
            for part in range(args.accumulate):
                with processes.averaging(joined, last=part == args.accumulate - 1):
                    z0, noise, t, context, hint = data.inputs(next(batches))
                    with optimisation.autocast():
                        value = joined(z0, noise, t, context, hint) / args.accumulate
                    optimisation.backward(value)
                total += value.detach()
            values = {"step": step + 1, "loss": processes.mean(float(total)), "lr": optimisation.current_lr}
            values["gradient"] = optimisation.step()
            if args.ema:
                parts["average"].update_parameters(control)
            position.seen += data.samples_a_step
            values["images_per_second"] = data.samples_a_step / (time.perf_counter() - began)

            # --- now and then: the loss on held-out pairs, pictures for their hints, and everything to disk
            done, last = step + 1, step + 1 == args.steps
            stopping = processes.any(stop.received is not None)
            if processes.first:
                with optimisation.autocast():  # a base in half precision and the fp32 copy meet only inside it
                    if data.held_out and (done % args.check_every == 0 or last):
                        values["held_out"] = data.held_out(loss)
                        values["zero_convs"] = zero_conv_norms(control)
                    if data.preview and (done % args.sample_every == 0 or last):
                        with borrowed(device, sd.vae, sd.text_encoder):
                            values |= data.preview.save(shown, run.grid(done))
                values |= {"skipped": optimisation.skipped, "bad": len(data.bad), "memory_gb": peak_memory(device)}
                progress.log(values)
                if done % args.save_every == 0 or last or stopping:
                    save(done)
            if stopping:
                break
    processes.leave()
    if stop.received is not None:
        print(f"\nsaved after step {done}: go on with --resume --out {args.out}", file=sys.stderr)
        return 128 + stop.received
    if processes.first:
        print(f"the ControlNet is {run.control}: try it with")
        base, hint = run.base if args.sd_unlocked else args.base, EXAMPLE_OF.get(args.data, "HINT.png")
        print(f"python infer.py --base {base} --hint {hint} --control {run.control}")
    return 0


def new_control(sd, args: argparse.Namespace):
    """The ControlNet to train on the base `sd`: a copy of its encoder, one of the paper's ablations, or --control."""
    import torch

    from controlnet.model import ControlNet, start_as_gaussian
    from ldm.config import ControlConfig

    if args.control:
        control = ControlNet.load(args.control, sd.unet, dtype=torch.float32)
        if control.config.hint_channels != args.hint_channels:
            raise ValueError(
                f"{args.control} reads hints of {control.config.hint_channels} channels: say --hint-channels"
            )
        return control
    kind = "lite" if args.architecture == "lite" else "full"
    control = ControlNet.from_unet(sd.unet, ControlConfig(args.hint_channels, architecture=kind))
    if args.architecture == "gaussian":
        start_as_gaussian(control)
    return control


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    try:
        args = settled(parser, args, argv)
        if not args.dry_run:
            return train(args)
        from controlnet.training.dry_run import described

        print(described(args))
        return 0
    except (ValueError, OSError, RuntimeError, FloatingPointError, MemoryError) as error:
        sentence = in_a_sentence(error, args)
        if args.debug or sentence is None:
            raise
        print(f"train.py: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped at once: go on from the last save in {args.out}, if any, with --resume", file=sys.stderr)
        return 130


def in_a_sentence(error: Exception, args: argparse.Namespace) -> str | None:
    """What a user can do something about; None for errors of our own."""
    from controlnet.common.devices import out_of_memory

    if out_of_memory(error):
        return (
            f"out of memory at --batch-size {args.batch_size}: take fewer with more --accumulate, or add "
            "--checkpointing or --precision fp16 (--dry-run tells how much each needs); what was saved is intact"
        )
    if isinstance(error, OSError):
        return f"{error}: make room or give another folder as --out; what was saved is intact"
    return str(error) if isinstance(error, ValueError | FloatingPointError) else None


if __name__ == "__main__":
    sys.exit(main())
