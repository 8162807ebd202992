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
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="fill50k",
        metavar="NAME",
        help="a folder of pairs (prompt.json, metadata.jsonl, or images/ hints/ captions/), or a world that draws "
        "them: fill50k, people, shapes, edges (default: %(default)s: data/fill50k if the published set lies there)",
    )
    data.add_argument("--pictures", type=positive, metavar="N", help="use the first N (default: all; of a world 2000)")
    data.add_argument("--size", type=size_argument, metavar="N|WxH", help="in pixels (default: the base's own)")
    data.add_argument("--detect", metavar="NAME", help="make the hints from the pictures: canny, scribble, tile ...")
    data.add_argument("--hint-channels", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    data.add_argument("--random-crop", action="store_true", help="another part of the picture each time (--no-cache)")
    data.add_argument("--flip", action="store_true", help="mirror half of the pairs (--no-cache)")
    data.add_argument(
        "--held-out", type=count, metavar="N", help="pairs not to train on (default: 1 in 20, at most 32)"
    )
    data.add_argument("--prompt-dropout", type=float, default=0.5, help="share of empty prompts (default: %(default)s)")
    data.add_argument("--bad-share", type=float, default=0.01, help="of the samples, skipped (default: %(default)s)")
    data.add_argument("--cache", type=Path, metavar="DIR", help="of the latents, to share it (default: OUT/cache)")
    data.add_argument("--no-cache", action="store_true", help="encode at each step; worlds are then endless")
    data.add_argument("--workers", type=count, metavar="N", help="processes that read (default: 0, with CUDA 4)")

    method = parser.add_argument_group("method")
    method.add_argument("--base", default="tiny", help="the locked model: a file or a preset (default: %(default)s)")
    method.add_argument("--prediction", choices=["eps", "v"], help="of an SD 2.x base whose file does not tell")
    method.add_argument("--control", metavar="FILE", help="start from this ControlNet, not from a fresh copy")
    method.add_argument(
        "--architecture",
        choices=["full", "lite", "gaussian"],
        default="full",
        help="lite: single convolutions, not a copy; gaussian: no zero convolutions. The paper's ablations",
    )
    method.add_argument("--steps", type=positive, default=1500, help="optimiser steps (default: %(default)s)")
    method.add_argument("--batch-size", type=positive, default=8, help="pictures at once (default: %(default)s)")
    method.add_argument("--accumulate", type=positive, default=1, help="batches a step (default: %(default)s)")
    method.add_argument("--lr", type=float, help="AdamW's rate (default: 1e-3 for tiny, 1e-5 for SD)")
    method.add_argument("--warmup", type=count, default=100, help="steps up to the full rate (default: %(default)s)")
    method.add_argument(
        "--rate", choices=["constant", "cosine"], default="constant", help="after the warm-up; cosine ends at 0"
    )
    method.add_argument(
        "--clip", type=float, default=1.0, help="largest norm of the gradients; the published trainer: inf (default: 1)"
    )
    method.add_argument("--eight-bit", action="store_true", help="AdamW's moments in 8 bits (needs bitsandbytes)")
    method.add_argument("--ema", type=float, metavar="DECAY", help="save a moving average of the copy, of 0.999, say")
    method.add_argument("--min-snr", type=float, metavar="GAMMA", help="weigh timesteps by min(SNR, GAMMA), usually 5")
    method.add_argument("--sd-unlocked", action="store_true", help="train the base's decoder too")
    method.add_argument("--only-mid-control", action="store_true", help="control the middle block alone")
    method.add_argument("--seed", type=int, default=0)

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    machine.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="of the computation")
    machine.add_argument("--checkpointing", action="store_true", help="less memory for activations, more time")
    machine.add_argument("--deterministic", action="store_true", help="the same bits each time on CUDA too, slower")
    machine.add_argument("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    machine.add_argument("--dry-run", action="store_true", help="print the plan and the memory it needs, train nothing")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/control"), help="the run's folder (default: %(default)s)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    run.add_argument("--save-dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of control.safetensors")
    run.add_argument("--save-every", type=positive, default=250, help="steps (default: %(default)s)")
    run.add_argument("--keep", type=positive, default=2, help="states, the newest ones (default: %(default)s)")
    run.add_argument(
        "--check-every", type=positive, default=50, help="steps, for the held-out loss (default: %(default)s)"
    )
    run.add_argument("--sample-every", type=positive, default=250, help="steps (default: %(default)s)")
    run.add_argument("--sample-count", type=count, default=8, help="pictures in a grid (default: %(default)s)")
    run.add_argument("--tensorboard", action="store_true", help="log there too (needs tensorboard)")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def size_argument(text: str) -> str:
    """512 or 512x768, width first: kept as it is typed, for settings.json."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f'it is "{text}", expected pixels like 512, or width x height like 512x768')
    return text


def train(args: argparse.Namespace) -> int:
    """-> the exit status: 0 if all steps are done, else that of the signal which stopped the run after a step."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from tqdm import tqdm

    from controlnet.devices import PRECISIONS, borrowed, peak_memory
    from controlnet.distributed import join_processes
    from controlnet.model import ControlNet, start_as_gaussian
    from controlnet.objective import ControlLoss, only_middle, zero_conv_norms
    from controlnet.run_state import Position, Progress, RunFolder, StopSignals
    from controlnet.training import Optimisation, constant_rate, cosine_rate
    from controlnet.training_data import DataSettings, TrainingData
    from ldm import StableDiffusion
    from ldm.config import ControlConfig
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
    sd.to(memory_format=torch.channels_last)  # the faster layout for convolutions, and for what a copy inherits
    if args.control:
        control = ControlNet.load(args.control, sd.unet, dtype=torch.float32)
    else:
        kind = "lite" if args.architecture == "lite" else "full"
        control = ControlNet.from_unet(sd.unet, ControlConfig(args.hint_channels, architecture=kind))
    if args.architecture == "gaussian":
        start_as_gaussian(control)
    if control.config.hint_channels != args.hint_channels:
        raise ValueError(f"{args.control} reads hints of {control.config.hint_channels} channels: say --hint-channels")
    control.to(memory_format=torch.channels_last)
    if args.only_mid_control:
        only_middle(control)
    if args.sd_unlocked:
        sd.unet.decoder.float().requires_grad_(True)
    set_checkpointing(sd.unet, args.checkpointing)
    set_checkpointing(control, args.checkpointing)

    # --- the loss as a module, and its optimiser
    loss = ControlLoss(sd.unet, control, sd.schedule, args.min_snr)
    if args.compile:
        loss.compile()
    joined = processes.joined(loss)
    trained = [(name, parameter) for name, parameter in loss.named_parameters() if parameter.requires_grad]
    lr = args.lr or (1e-3 if sd.config.name == "tiny" else 1e-5)
    rate = cosine_rate(args.warmup, args.steps) if args.rate == "cosine" else constant_rate(args.warmup)
    optimisation = Optimisation(trained, lr, rate, device, args.precision, args.clip, args.eight_bit)

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

    # --- pictures become latents, once; then the autoencoder and the text encoder leave the device
    settings = DataSettings(**{name: getattr(args, name) for name in DataSettings.__dataclass_fields__})
    data = TrainingData(settings, sd, processes, None if args.no_cache else args.cache or args.out / "cache")
    batches = data.batches(position.seen)
    if not args.no_cache:
        sd.vae.cpu()
        sd.text_encoder.cpu()
    if processes.first:
        run.begin(start, vars(args), data.fingerprint)

    def save(step: int) -> None:
        run.save(step, args.keep, **parts)
        shown.save(run.control, PRECISIONS[args.save_dtype])
        if args.sd_unlocked:
            sd.save(run.base, PRECISIONS[args.save_dtype])

    bar = tqdm(range(start, args.steps), "train", args.steps, initial=start, mininterval=1, disable=not processes.first)
    progress = Progress(run, bar, args.tensorboard) if processes.first else None
    with StopSignals() as stop, bar:
        for step in bar:
            # --- one step: the loss of a few batches. Noise, timestep and dropped prompts are each sample's own
            began = time.perf_counter()
            total = 0.0
            for part in range(args.accumulate):
                with processes.averaging(joined, last=part == args.accumulate - 1):
                    z0, noise, t, context, hint = data.inputs(next(batches))
                    with optimisation.autocast():
                        value = joined(z0, noise, t, context, hint) / args.accumulate
                    optimisation.backward(value)
                total += value.item()
            values = {"step": step + 1, "loss": processes.mean(total), "lr": optimisation.current_lr}
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
        base = run.base if args.sd_unlocked else args.base
        print(f"python infer.py --base {base} --hint circle.png --control {run.control}")
    return 0


def dry_run(args: argparse.Namespace) -> int:
    """Prints what would be trained and in how much memory. Of the base's file the header is read, if it is needed."""
    from controlnet.memory import Plan, described, predict
    from controlnet.training_data import DataSettings, open_settings, picture_size
    from ldm.checkpoint import open_checkpoint
    from ldm.config import PRESETS
    from ldm.recognise import recognise
    from ldm.stable_diffusion import find

    known = args.base in PRESETS  # then the file may come later
    config = PRESETS[args.base] if known else recognise(open_checkpoint(find(args.base)[0]), args.prediction).config
    size = picture_size(args.size, config)
    settings = DataSettings(**{name: getattr(args, name) for name in DataSettings.__dataclass_fields__})
    pairs = len(open_settings(settings, size).train)
    plan = Plan(
        size,
        args.batch_size,
        args.precision,
        args.checkpointing,
        not args.no_cache,
        args.hint_channels,
        args.sd_unlocked,
        args.only_mid_control,
        args.eight_bit,
        bool(args.ema),
        args.architecture == "lite",
    )
    memory, samples = predict(config, plan), args.steps * args.batch_size * args.accumulate
    print(f"{config.name}: {memory.trained / 1e6:.1f} million parameters are trained, in {args.precision}")
    print(f"{pairs} pairs of {size[1]}x{size[0]} pixels, {samples} samples seen ({samples / pairs:.1f} epochs)")
    print(f"{args.steps} optimiser steps of {args.accumulate} x {args.batch_size}, a process")
    print(described(memory))
    return 0


def checked(args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """The settings as they count: with --resume, what is not given is as it was. Raises ValueError for contradictions,
    and rather than write over another run."""
    from controlnet.devices import optional
    from controlnet.run_state import RunFolder

    run = RunFolder(args.out)
    if args.tensorboard:
        optional("tensorboard", "--tensorboard")
    if args.ema and args.sd_unlocked:
        raise ValueError("--ema averages the copy alone, and --sd-unlocked trains the decoder with it: leave out one")
    if args.control and args.architecture != "full":
        raise ValueError("--control brings its own architecture: leave out --architecture, or start without --control")
    if args.resume:
        parser = make_parser()
        parser.set_defaults(**run.written()["settings"])
        args = parser.parse_args(argv)
        run.check_same(vars(args))
    elif not args.dry_run:
        run.check_new()
    return args


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        args = checked(args, argv)
        return dry_run(args) if args.dry_run else train(args)
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
    from controlnet.devices import out_of_memory

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
