"""Trains a ControlNet (arXiv 2302.05543) on a locked Stable Diffusion.

    python train.py --data fill50k

with the small base of weights/: a laptop without a GPU sees the sudden convergence within minutes. The run's folder
gets log.txt, sample grids (hint | sample | target), the resumable state, and control.safetensors.
"""

import argparse
import sys
import time
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")

    data = parser.add_argument_group("data and model")
    data.add_argument("--data", default="fill50k", choices=["fill50k"], help="what to train on (default: %(default)s)")
    data.add_argument("--pictures", type=positive, default=2000, help="how many (default: %(default)s)")
    data.add_argument("--base", default="tiny", help="the locked model: a file or a preset (default: %(default)s)")
    data.add_argument("--prediction", choices=["eps", "v"], help="of an SD 2.x base whose file does not tell")
    data.add_argument("--prompt-dropout", type=float, default=0.5, help="share of empty prompts (default: %(default)s)")

    method = parser.add_argument_group("method")
    method.add_argument("--steps", type=positive, default=1500, help="optimiser steps (default: %(default)s)")
    method.add_argument("--batch-size", type=positive, default=8, help="pictures at once (default: %(default)s)")
    method.add_argument("--accumulate", type=positive, default=1, help="batches a step (default: %(default)s)")
    method.add_argument("--lr", type=float, help="AdamW's rate (default: 1e-3 for tiny, 1e-5 for SD)")
    method.add_argument("--warmup", type=int, default=100, help="steps up to the full rate (default: %(default)s)")
    method.add_argument(
        "--rate", choices=["constant", "cosine"], default="constant", help="after the warm-up; cosine ends at 0"
    )
    method.add_argument(
        "--clip", type=float, default=1.0, help="largest norm of the gradients; the published trainer: inf (default: 1)"
    )
    method.add_argument("--seed", type=int, default=0)

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    machine.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="of the computation")
    machine.add_argument("--checkpointing", action="store_true", help="less memory for activations, more time")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/control"), help="the run's folder (default: %(default)s)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--save-dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of control.safetensors")
    run.add_argument("--save-every", type=positive, default=250, help="steps (default: %(default)s)")
    run.add_argument("--sample-every", type=positive, default=250, help="steps (default: %(default)s)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def train(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from controlnet import ControlNet
    from controlnet.data import LatentPairs, drop_prompts, seeded
    from controlnet.devices import PRECISIONS, pick_device
    from controlnet.objective import control_loss
    from controlnet.preview import Preview
    from controlnet.run_state import load_state, save_state
    from controlnet.training import Optimisation, constant_rate, cosine_rate
    from controlnet.worlds import Fill50k
    from ldm import StableDiffusion
    from ldm.unet import set_checkpointing

    state, log = prepare_folder(args)

    # --- the locked base, in half precision where the computation is, and the trainable copy in fp32
    device = pick_device(args.device)
    dtype = PRECISIONS[args.precision]
    torch.manual_seed(args.seed)
    sd = StableDiffusion.load(args.base, device, dtype, args.prediction)
    sd.to(memory_format=torch.channels_last)  # the faster layout for convolutions, and for what a copy inherits
    control = ControlNet.from_unet(sd.unet).to(memory_format=torch.channels_last)
    set_checkpointing(sd.unet, args.checkpointing)
    set_checkpointing(control, args.checkpointing)
    lr = args.lr or (1e-3 if sd.config.name == "tiny" else 1e-5)
    rate = cosine_rate(args.warmup, args.steps) if args.rate == "cosine" else constant_rate(args.warmup)
    optimisation = Optimisation(control.parameters(), lr, rate, device, args.precision, args.clip)
    start = load_state(state, control=control, optimisation=optimisation) if args.resume else 0

    # --- pictures become latents once, then the autoencoder is needed for previews only
    world = Fill50k(sd.config.resolution, args.seed)
    pairs = LatentPairs(world, args.pictures, sd)
    preview = Preview(sd, Fill50k(sd.config.resolution, held_out=True))

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="train", mininterval=1)
    for step in bar:
        # --- one step: the loss of a few batches, each with its own timesteps and noise
        generator = seeded(args.seed, step)
        total = 0.0
        for _ in range(args.accumulate):
            batch = pairs.batch(pairs.draw(args.batch_size, generator))
            noise = torch.randn(batch.latents.shape, generator=generator).to(device)
            t = torch.randint(sd.schedule.config.timesteps, (args.batch_size,), generator=generator).to(device)
            captions = drop_prompts(batch.captions, args.prompt_dropout, generator)
            with optimisation.autocast():
                with torch.no_grad():
                    context = sd.encode_text(captions)
                z0, hint = batch.latents.to(device), batch.hints.to(device)
                loss = control_loss(sd.unet, control, sd.schedule, z0, noise, t, context, hint) / args.accumulate
            optimisation.backward(loss)
            total += loss.item()
        norm = optimisation.step()
        bar.set_postfix(loss=f"{total:.4f}", grad=f"{norm:.3f}", refresh=False)

        # --- now and then: pictures of held-out hints, and everything to disk
        done = step + 1
        if done % args.sample_every == 0 or done == args.steps:
            with optimisation.autocast():  # a base in half precision and the fp32 copy meet only inside it
                iou = preview.save(control, args.out / f"step-{done:06d}.png")
            line = f"{time.strftime('%H:%M:%S')} step {done} loss {total:.4f} iou {iou:.3f}"
            tqdm.write(line)
            with open(log, "a") as file:
                file.write(line + "\n")
        if done % args.save_every == 0 or done == args.steps:
            control.save(args.out / "control.safetensors", PRECISIONS[args.save_dtype])
            save_state(state, done, control=control, optimisation=optimisation)
    print(f"the ControlNet is {args.out / 'control.safetensors'}: try it with")
    print(f"python infer.py --base {args.base} --hint circle.png --control {args.out / 'control.safetensors'}")


def prepare_folder(args: argparse.Namespace) -> tuple[Path, Path]:
    """-> the paths of the resumable state and of the log. Raises ValueError rather than overwrite another run."""
    state = args.out / "state.pt"
    if state.exists() and not args.resume:
        raise ValueError(f"{args.out} holds a run already: go on with --resume, or give another folder as --out")
    if args.resume and not state.exists():
        raise ValueError(f"there is no run to resume in {args.out}, expected {state}: leave --resume out to start one")
    args.out.mkdir(parents=True, exist_ok=True)
    return state, args.out / "log.txt"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        train(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = (args.out / "state.pt").exists()
        advice = f"go on from the last save with --resume --out {args.out}" if saved else "nothing was saved yet"
        print(f"\nstopped: {advice}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
