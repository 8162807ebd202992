"""Pictures from a prompt and hints, with Stable Diffusion and ControlNets.

    python infer.py --hint circle.png --prompt "red circle with blue background"
    python infer.py --base sd15 --control control_v11p_sd15_canny --hint edges.png --prompt "a bird" --count 4

Prints the path of each picture. Each PNG carries its prompt, seed and settings, as A1111 and its viewers read them
("parameters") and as JSON ("controlnet").
"""

import argparse
import json
import os
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
TINY_CONTROL = "tiny-fill50k"  # goes with the base "tiny"

# What A1111 and its viewers call the samplers.
A1111_SAMPLERS = {"ddim": "DDIM", "ddpm": "DDPM", "dpm++": "DPM++ 2M"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python infer.py [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")

    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", default="", metavar="TEXT", help="what the picture shows (default: empty)")
    what.add_argument("--negative", default="", metavar="TEXT", help="what it should not show (default: empty)")
    what.add_argument(
        "--hint",
        action="append",
        default=[],
        metavar="FILE",
        help="the picture that steers; a file, or a name in assets/. Repeat it for more than one",
    )
    what.add_argument(
        "--size",
        type=size_argument,
        metavar="N|WxH",
        help="pixels, a side or width x height; hints are resized to it (default: near the base's resolution, in the "
        "shape of the first hint)",
    )
    what.add_argument("--count", type=positive, default=1, metavar="N", help="how many pictures (default: %(default)s)")
    what.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the first picture; each has the next (default: %(default)s)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--base", default="tiny", metavar="FILE", help="a file, or sd15, sd21 ... in weights/ (default: %(default)s)"
    )
    model.add_argument(
        "--prediction",
        choices=["eps", "v"],
        help="what the base predicts, where its file does not tell (default: v for an SD 2.x file of unknown name)",
    )
    model.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="FILE",
        help=f"a ControlNet, one for each hint: a file, or a name in weights/ (default: {TINY_CONTROL}, for tiny)",
    )
    model.add_argument(
        "--control-scale",
        action="append",
        type=float,
        default=[],
        metavar="X",
        help="how much it steers: 0 not at all; one for all hints or one for each (default: 1)",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=int, default=20, metavar="N", help="of denoising (default: %(default)s)")
    sampling.add_argument(
        "--sampler", default="ddim", metavar="NAME", help=f"{', '.join(A1111_SAMPLERS)} (default: %(default)s)"
    )
    sampling.add_argument(
        "--cfg",
        type=float,
        metavar="X",
        help="how much the prompt counts; 1 is no guidance (default: 7.5; for tiny 2.5)",
    )
    sampling.add_argument(
        "--eta",
        type=float,
        default=0.0,
        metavar="X",
        help="noise that ddim adds, from 0 to 1, which is as much as ddpm (default: %(default)s)",
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="PATH",
        help="a folder, where the next free number is taken (0001.png ...), or a file ending in .png, which is "
        "replaced (default: %(default)s)",
    )
    run.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)"
    )
    run.add_argument(
        "--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of the networks (default: %(default)s)"
    )
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def size_argument(text: str) -> tuple[int, int]:
    """512 or 512x768, width first as everywhere outside tensors -> (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f'it is "{text}", expected pixels like 512, or width x height like 512x768')
    return int(sides[-1]), int(sides[0])


def infer(args: argparse.Namespace) -> None:
    # Imported here, because it takes seconds: --help does not need it.
    from tqdm import tqdm

    from controlnet.devices import PRECISIONS, pick_device
    from controlnet.generate import check_size, default_cfg, default_size, generate, make_hint
    from controlnet.guidance import Control
    from controlnet.images import read_image, save_png
    from controlnet.model import ControlNet
    from ldm import StableDiffusion
    from ldm.samplers import timesteps_for
    from ldm.stable_diffusion import find

    # --- what can be wrong and is quick to see, before the models are read
    base, preset = find(args.base)
    hint_files = [find_hint(name) for name in args.hint]
    control_files = find_controls(args, tiny=preset is not None and preset.name == "tiny")
    scales = spread(args.control_scale or [1.0], len(hint_files))
    images = [read_image(file) for file in hint_files]
    device, dtype = pick_device(args.device), PRECISIONS[args.dtype]
    check_out(args.out)

    # --- models and hints
    sd = StableDiffusion.load(args.base, device, dtype, args.prediction)
    size = args.size or default_size(sd.config, *images[:1])
    check_size(sd.config, size)
    nets = [ControlNet.load(file, sd.unet) for file in control_files]
    hints = [make_hint(image, size) for image in images]
    controls = [Control(*parts) for parts in zip(nets, hints, scales, strict=True)]
    note_cut_prompts(sd.tokenizer, [args.prompt, args.negative])

    # --- picture after picture, each saved as soon as it is there
    cfg = default_cfg(sd.config) if args.cfg is None else args.cfg
    sampling = {"steps": args.steps, "sampler": args.sampler, "cfg": cfg, "eta": args.eta}
    settings = {
        "prompt": args.prompt,
        "negative": args.negative,
        **sampling,
        "size": f"{size[1]}x{size[0]}",
        "dtype": args.dtype,
        "base": base.name,
        "controls": [
            {"control": control.name, "hint": hint.name, "scale": scale}
            for control, hint, scale in zip(control_files, hint_files, scales, strict=True)
        ],
    }
    steps = len(timesteps_for(args.sampler, sd.schedule, args.steps))  # DDIM's are not always as many as asked for
    with tqdm(total=args.count * steps, unit="step", disable=None) as bar:
        for i in range(args.count):
            seed = args.seed + i
            (picture,) = generate(
                sd,
                args.prompt,
                controls,
                negative=args.negative,
                size=size,
                seed=seed,
                on_step=lambda *_: bar.update(),
                **sampling,
            )
            path = picture_path(args.out, i, args.count)
            if path.exists():
                tqdm.write(f"{path} is replaced", file=sys.stderr)
            save_png(picture, path, png_texts({**settings, "seed": seed}))
            tqdm.write(str(path))


# ---------------------------------------------------------------------------------------------------- what goes in


def find_hint(name: str) -> Path:
    """The file, or the example in assets/ of that name, which is said."""
    path = Path(name)
    if path.exists() or not (ASSETS / path).is_file():
        return path
    note(f'"{name}" is not in this folder: taking the example in assets/')
    return ASSETS / path


def find_controls(args: argparse.Namespace, tiny: bool) -> list[Path]:
    """One file for each hint. Raises ValueError if their numbers differ or there is no such file."""
    names = args.control or ([TINY_CONTROL] * len(args.hint) if tiny else [])
    if len(names) != len(args.hint):
        raise ValueError(
            f"there are {len(args.hint)} --hint and {len(names)} --control, expected one --control for each --hint"
        )
    return [find_control(name) for name in names]


def find_control(name: str) -> Path:
    from ldm.stable_diffusion import WEIGHTS

    for path in (Path(name), WEIGHTS / name, WEIGHTS / f"{name}.safetensors"):
        if path.is_file():
            return path
    raise ValueError(f'there is no ControlNet "{name}", neither as a file nor in {WEIGHTS}: give its path')


def spread(scales: list[float], count: int) -> list[float]:
    """One scale for all, or one for each. Raises ValueError otherwise."""
    if len(scales) == 1:
        return scales * count
    if len(scales) != count:
        raise ValueError(
            f"there are {len(scales)} --control-scale and {count} --hint, expected one scale for all or for each"
        )
    return scales


def note_cut_prompts(tokenizer, prompts: list[str]) -> None:
    """The text encoder reads a fixed number of tokens: what comes later has no effect, which is said."""
    for prompt in prompts:
        ignored = tokenizer.encode(prompt)[tokenizer.positions - 2 :]
        if ignored:
            note(f'the prompt is too long, its end is ignored: "{tokenizer.decode(ignored)}"')


def note(text: str) -> None:
    """To stderr: stdout has the pictures' paths alone."""
    print(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- what comes out


def is_file_name(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def check_out(out: Path) -> None:
    """Raises ValueError for a place where no picture can be saved, before time is spent on it."""
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp") or (is_file_name(out) and out.is_dir()):
        raise ValueError(f'--out is "{out}", expected a folder or the name of a file ending in .png')
    there = out.parent if is_file_name(out) else out
    while not there.exists():  # the folders that are not there will be made
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is a file, not a folder"
        raise ValueError(f'--out is "{out}", but "{there}" {what}: give another folder, or a name ending in .png')


def picture_path(out: Path, i: int, count: int) -> Path:
    """Where picture i of `count` goes: the next free number in a folder; else the name given, numbered if needed."""
    if is_file_name(out):
        return out if count == 1 else out.with_name(f"{out.stem}-{i + 1}{out.suffix}")
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdecimal()]
    return out / f"{max(taken, default=0) + 1:04d}.png"


def png_texts(settings: dict) -> dict[str, str]:
    return {"parameters": a1111_parameters(settings), "controlnet": json.dumps(settings)}


def a1111_parameters(settings: dict) -> str:
    """The text that A1111 writes: prompt, negative prompt, and one line of "Name: value" pairs."""
    pairs = {
        "Steps": settings["steps"],
        "Sampler": A1111_SAMPLERS[settings["sampler"]],
        "CFG scale": settings["cfg"],
        "Seed": settings["seed"],
        "Size": settings["size"],
        "Model": Path(settings["base"]).stem,
        "Eta": settings["eta"],
    }
    for i, control in enumerate(settings["controls"]):
        pairs[f"ControlNet {i}"] = f'"Model: {Path(control["control"]).stem}, Weight: {control["scale"]}"'
    lines = [settings["prompt"]]
    if settings["negative"]:
        lines.append(f"Negative prompt: {settings['negative']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        infer(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the pictures listed above are saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
