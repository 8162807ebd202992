"""Pictures from a prompt and hints, with Stable Diffusion and ControlNets.

    python infer.py --hint circle.png --prompt "red circle with blue background"
    python infer.py --base sd15 --control canny --hint bird.jpg --detect canny --prompt "a bird" --count 4
    python infer.py --base sd15 --init photo.png --strength 0.6 --prompt "an oil painting"
    python infer.py --base sd15 --init photo.png --mask hole.png --prompt "a cat"
    python infer.py --again out/0001.png

Prints the path of each picture. Each PNG carries all that makes it again, as A1111 and its viewers read it
("parameters") and as JSON ("controlnet"), which --again reads.

Pictures that go in are resized to the size of the picture made: its short side is the base's resolution and each side
a multiple of 64 (of 32 for tiny), in the shape of --init, else of the first hint; smaller ones with Lanczos, larger
ones by area, transparent parts over white.
"""

import argparse
import math
import os
import sys
import warnings
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
SAMPLERS = ("ddim", "ddpm", "dpm++")
MODES = ("balanced", "guess", "resolution", "resolution-literal", "middle", "prompt", "shuffle")

# Options that belong to a hint, given once for all hints or once for each, and what they are otherwise.
EACH = {
    "hint": None,
    "detect": "none",
    "control": None,
    "control_scale": 1.0,
    "control_layers": None,
    "control_start": 0.0,
    "control_end": 1.0,
    "control_mask": None,
    "control_mode": "balanced",
}

# What else decides over a picture and is kept in it.
RECORDED = (
    *("prompt", "negative", "size", "seed", "init", "strength", "mask"),
    *("base", "prediction", "clip_skip", "long_prompts"),
    *("steps", "sampler", "cfg", "eta", "reuse", "device", "dtype", "low_memory"),
)


# ---------------------------------------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python infer.py [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    add_what_to_make(parser.add_argument_group("what to make"))
    add_start(parser.add_argument_group("from a picture"))
    add_controls(parser.add_argument_group("hints and controls: once for all hints, or once for each"))
    add_model(parser.add_argument_group("model"))
    add_sampling(parser.add_argument_group("sampling"))
    add_run(parser.add_argument_group("run"))
    return parser


def add_what_to_make(group) -> None:
    add = group.add_argument
    add(
        "--prompt",
        default="",
        metavar="TEXT",
        help="what the picture shows; (word), (word:1.3) and [word] count more or less, BREAK begins a new chunk of 75 "
        r"tokens, \( is a bracket (default: empty)",
    )
    add("--negative", default="", metavar="TEXT", help="what it should not show (default: empty)")
    add("--long-prompts", action="store_true", help="read prompts of more than 75 tokens in chunks, instead of cutting")
    add(
        "--size",
        type=size_argument,
        metavar="N|WxH",
        help="pixels, a side or width x height (default: near the base's resolution, in the shape of --init or of the "
        "first hint)",
    )
    add("--count", type=positive, default=1, metavar="N", help="how many pictures (default: %(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the first picture; each has the next (default: %(default)s)",
    )
    add(
        "--again",
        metavar="FILE",
        help="make this picture again, from what it says about itself; other options change it",
    )


def add_start(group) -> None:
    add = group.add_argument
    add("--init", metavar="FILE", help="begin from this picture (image-to-image)")
    add(
        "--strength",
        type=fraction,
        metavar="X",
        help="how much is made anew: 0 keeps the picture, 1 begins from noise (default: 0.75; with --mask 1)",
    )
    add(
        "--mask",
        metavar="FILE",
        help="white is made anew, black is kept to the bit (inpainting); as large as --init. Also for --detect inpaint",
    )


def add_controls(group) -> None:
    add = group.add_argument
    add("--hint", action="append", metavar="FILE", help="the picture that steers; a file, or a name in assets/")
    add(
        "--detect",
        action="append",
        metavar="NAME",
        help="make the hint from the picture given: canny, canny:low=50,high=150, scribble, depth ... (`python -m "
        "tools.make_hints --help` lists them), inpaint with --mask, or none (default: none)",
    )
    add(
        "--control",
        action="append",
        metavar="FILE",
        help="a ControlNet, one for each hint: a file, or a name in weights/, also a short one (pose, canny); for tiny "
        "the hint tells it: limb colours are a pose, one thin white circle is a circle, other white lines are canny",
    )
    add("--control-scale", action="append", type=number, metavar="X", help="how much it steers, 0 not (default: 1)")
    add(
        "--control-layers",
        action="append",
        type=numbers,
        metavar="X,X,...",
        help="and how much in each layer, 13 numbers for SD: encoder from fine to coarse, middle (default: all 1)",
    )
    add("--control-start", action="append", type=fraction, metavar="X", help="from this part of the steps (default: 0)")
    add("--control-end", action="append", type=fraction, metavar="X", help="to this part of the steps (default: 1)")
    add("--control-mask", action="append", metavar="FILE", help="where: white steers, black does not (default: all)")
    add(
        "--control-mode",
        action="append",
        choices=MODES,
        help="guess: fading layers, not for the negative prompt; resolution: the paper's weights 64/h, divided by 8, "
        "not for the negative prompt; resolution-literal: not divided; middle: the middle layer alone; prompt: not for "
        "the negative prompt; shuffle: for shuffle models, whose layers are averaged over the picture, not for the "
        "negative prompt (default: balanced, which is none of these)",
    )
    add("--guess", action="store_true", help="short for --control-mode guess, for all hints; a prompt is not needed")


def add_model(group) -> None:
    add = group.add_argument
    add("--base", default="tiny", metavar="FILE", help="a file, or sd15, sd21 ... in weights/ (default: %(default)s)")
    add(
        "--prediction",
        choices=["eps", "v"],
        help="what the base predicts, where its file does not tell (default: v for an SD 2.x file of unknown name)",
    )
    add(
        "--clip-skip",
        type=positive,
        default=1,
        metavar="N",
        help="the text encoder's layer that is read, from the last: 2 for many anime models (default: %(default)s)",
    )


def add_sampling(group) -> None:
    add = group.add_argument
    add("--steps", type=int, default=20, metavar="N", help="of denoising (default: %(default)s)")
    add("--sampler", default="ddim", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: %(default)s)")
    add(
        "--cfg", type=number, metavar="X", help="how much the prompt counts; 1 is no guidance (default: 7.5; tiny: 2.5)"
    )
    add(
        "--eta",
        type=number,
        default=0.0,
        metavar="X",
        help="noise that ddim adds, from 0 to 1, which is as much as ddpm (default: %(default)s)",
    )
    add(
        "--reuse",
        type=positive,
        default=1,
        metavar="N",
        help="compute the ControlNets and all but two blocks of the UNet at every Nth step only, which is faster but "
        "approximate: 2 is a good choice (default: %(default)s, exact)",
    )


def add_run(group) -> None:
    add = group.add_argument
    add(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="PATH",
        help="a folder, where the next free number is taken (0001.png ...), or a file ending in .png, which is "
        "replaced (default: %(default)s)",
    )
    add("--save-hint", action="store_true", help="also save the hints as the model sees them, beside the first picture")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of the networks (default: %(default)s)")
    add(
        "--low-memory",
        action="store_true",
        help="networks on the device only while they are used, guidance in two passes, pictures decoded in strips",
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def fraction(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def numbers(text: str) -> list[float]:
    return [number(part) for part in text.split(",")]


def size_argument(text: str) -> tuple[int, int]:
    """512 or 512x768, width first as everywhere outside tensors -> (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f'it is "{text}", expected pixels like 512, or width x height like 512x768')
    return int(sides[-1]), int(sides[0])


def parse_args(argv: list[str] | None = None, recorded: dict | None = None) -> argparse.Namespace:
    """`recorded` settings of a picture stand in for what is not given."""
    parser, recorded = build_parser(), recorded or {}
    parser.set_defaults(**{name: retyped(parser, name, recorded[name]) for name in RECORDED if name in recorded})
    args = parser.parse_args(argv)
    if args.guess and args.control_mode:
        parser.error("--guess is short for --control-mode guess: give one of them")
    for name, default in EACH.items():
        if getattr(args, name) is None:
            values = [retyped(parser, name, value) for value in recorded.get(name, [])]
            setattr(args, name, [value[0] if value else default for value in values])
    if args.guess:
        args.control_mode = ["guess"]
    return args


def retyped(parser: argparse.ArgumentParser, name: str, value):
    """A setting read from a file as if it were typed: what a command line cannot have stops the parser."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    option = "--" + name.replace("_", "-") + ("" if value is True else f"={text}")
    return getattr(parser.parse_args([] if value is None or value is False else [option]), name)


# ---------------------------------------------------------------------------------------------------- one run


def infer(args: argparse.Namespace, recorded: dict) -> None:
    """Everything that can be wrong and is quick to see is checked before the weights are read."""
    # Imported here, because it takes seconds: --help does not need it.
    from controlnet.common.devices import PRECISIONS, keep_freed_memory, pick_device
    from controlnet.inference import inputs
    from controlnet.inference.generate import default_cfg
    from ldm import StableDiffusion
    from ldm.fast.packed import pack
    from ldm.stable_diffusion import find

    base, _ = find(args.base)
    config = inputs.config_of(base, args.prediction)
    cfg = default_cfg(config) if args.cfg is None else args.cfg
    inputs.check_sampling(config, args.sampler, args.steps, cfg, args.eta, args.seed, args.count, args.clip_skip)
    device, dtype = pick_device(args.device), PRECISIONS[args.dtype]
    check_out(args.out)
    check_pairs(args)
    size, init, steerings = read_pictures(args, config)

    settings = {name: getattr(args, name) for name in RECORDED}
    settings |= {name: [getattr(steering, name) for steering in steerings] for name in EACH}
    settings |= {"size": f"{size[1]}x{size[0]}", "strength": init and init.strength, "device": str(device), "cfg": cfg}
    used = {args.base: base, **{name: Path(name) for name in (args.init, args.mask) if name}}
    for steering in steerings:
        used |= steering.files()
    settings["files"] = inputs.fingerprints(used, recorded.get("files", {}))

    if not args.low_memory:
        keep_freed_memory(device, large=False)
    sd = StableDiffusion.load(args.base, "cpu" if args.low_memory else device, dtype, args.prediction)
    note_cut_prompts(sd.tokenizer, args)
    controls = inputs.load_controls(steerings, sd.unet)
    if not args.low_memory:  # which moves networks about, and needs plain weights for its strips
        pack(sd.unet, sd.vae, *(control.net for control in controls))
    if args.save_hint:
        save_hints([control.hint for control in controls], picture_path(args.out, 0, args.count))
    make_pictures(args, sd, controls, init, size, settings, device)


def read_pictures(args: argparse.Namespace, config) -> tuple:
    """The size, the `Init` or None, and a `Steering` for each hint, whose ControlNet is not loaded yet."""
    from controlnet.common.images import read_image, read_mask
    from controlnet.inference.generate import check_size, default_size
    from controlnet.inference.image_to_image import Init
    from controlnet.inference.inputs import Steering, note_stretch

    image = read_image(args.init) if args.init else None
    mask = read_mask(args.mask) if args.mask else None
    values = [spread(name, getattr(args, name), default, len(args.hint)) for name, default in EACH.items()]
    steerings = [Steering(**dict(zip(EACH, row, strict=True))) for row in zip(*values, strict=True)]
    for steering in steerings:
        steering.read(find_hint(steering.hint))
    first = image or (steerings[0].source if steerings else None)
    size = args.size or default_size(config, first)
    check_size(config, size)
    if image:
        note_stretch(args.init, image, size, note)
    for steering in steerings:
        steering.prepare(size, mask, config, note)
    strength = args.strength if args.strength is not None else (1.0 if mask else 0.75)
    return size, image and Init(image, strength, mask), steerings


def make_pictures(args, sd, controls, init, size, settings, device) -> None:
    """Each is saved as soon as it is there."""
    from tqdm import tqdm

    from controlnet.common.images import save_png
    from controlnet.guidance import acting_timesteps
    from controlnet.inference.generate import generate
    from controlnet.inference.image_to_image import steps_done
    from controlnet.inference.png_text import png_texts
    from ldm.samplers import timesteps_for

    steps = len(timesteps_for(args.sampler, sd.schedule, args.steps))  # DDIM's are not always as many as asked for
    steps = steps_done(init.strength, steps) if init else steps
    for name, control in zip(settings["hint"], controls, strict=True):
        if not acting_timesteps(range(steps), control.start, control.end):
            note(f'"{name}" acts in none of the {steps} steps, from {control.start} to {control.end} of them')
    with tqdm(total=args.count * steps, unit="step", disable=None) as bar:
        for i in range(args.count):
            seed = args.seed + i
            (picture,) = generate(
                sd,
                args.prompt,
                controls,
                negative=args.negative,
                size=size,
                steps=args.steps,
                sampler=args.sampler,
                cfg=settings["cfg"],
                eta=args.eta,
                seed=seed,
                on_step=lambda *_: bar.update(),
                init=init,
                clip_skip=args.clip_skip,
                long_prompts=args.long_prompts,
                low_memory=device if args.low_memory else None,
                reuse=args.reuse,
            )
            path = picture_path(args.out, i, args.count)
            if path.exists():
                tqdm.write(f"{path} is replaced", file=sys.stderr)
            save_png(picture, path, png_texts({**settings, "seed": seed}))
            tqdm.write(str(path))


# ---------------------------------------------------------------------------------------------------- what goes in


def spread(name: str, values: list, default, count: int) -> list:
    """One value for each hint, from one for all or one for each. Raises ValueError otherwise."""
    option = "--" + name.replace("_", "-")
    if not values:
        return [default] * count
    if count == 0:
        raise ValueError(f"there is a {option} without a --hint: give a --hint, or leave it out")
    if len(values) not in (1, count):
        raise ValueError(f"there are {len(values)} {option} and {count} --hint, expected one for all or for each")
    return values * count if len(values) == 1 else values


def check_pairs(args: argparse.Namespace) -> None:
    """Raises ValueError for an option without the one that it belongs to."""
    if args.control and len(args.control) != len(args.hint):
        raise ValueError(
            f"there are {len(args.hint)} --hint and {len(args.control)} --control, expected one --control for each "
            "--hint"
        )
    if args.strength is not None and args.init is None:
        raise ValueError("there is a --strength without --init: give the picture to begin with, or leave it out")
    if args.mask is not None and args.init is None and "inpaint" not in args.detect:
        raise ValueError("there is a --mask without --init: give the picture that it is for")
    if args.mask is None and "inpaint" in args.detect:
        raise ValueError("--detect inpaint needs a --mask: white where the picture is to be made anew")


def find_hint(name: str) -> Path:
    """The file, or the example in assets/ of that name, which is said."""
    path = Path(name)
    if path.exists() or not (ASSETS / path).is_file():
        return path
    note(f'"{name}" is not in this folder: taking the example in assets/')
    return ASSETS / path


def note_cut_prompts(tokenizer, args: argparse.Namespace) -> None:
    """What the text encoder does not read has no effect, which is said."""
    from controlnet.inference.prompts import cut_texts

    for prompt in () if args.long_prompts else (args.prompt, args.negative):
        for text in cut_texts(tokenizer, prompt):
            note(f'the prompt is too long, its end is ignored: "{text}" (--long-prompts reads it)')


def note(text: str) -> None:
    """To stderr: stdout has the pictures' paths alone."""
    print(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- what comes out


def is_file_name(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def check_out(out: Path) -> None:
    """Raises ValueError for a place where no picture can be saved, before time is spent on it."""
    other_pictures = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    if out.suffix.lower() in other_pictures or (is_file_name(out) and out.is_dir()):
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


def save_hints(hints: list, picture: Path) -> None:
    """0001-hint.png for 0001.png, with more than one hint 0001-hint-1.png and so on."""
    from PIL import Image

    from controlnet.common.images import save_png, to_uint8

    for i, hint in enumerate(hints):
        path = picture.with_name(f"{picture.stem}-hint{f'-{i + 1}' if len(hints) > 1 else ''}.png")
        save_png(Image.fromarray(to_uint8(hint[0].expand(3, -1, -1))), path, {})  # also of one channel
        note(f"the hint is saved as {path}")


def main(argv: list[str] | None = None) -> int:
    args, recorded = parse_args(argv), {}
    warnings.showwarning = lambda message, *_: note(f"infer.py: {message}")
    try:
        if args.again is not None:
            from controlnet.inference.png_text import read_settings

            recorded = read_settings(args.again, RECORDED, EACH)
            args = parse_args(argv, recorded)
        infer(args, recorded)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        sentence = in_a_sentence(error)
        if args.debug or sentence is None:
            raise
        print(f"infer.py: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the pictures listed above are saved", file=sys.stderr)
        return 130
    return 0


def in_a_sentence(error: Exception) -> str | None:
    """What a user can do something about; None for errors of our own."""
    from controlnet.common.devices import out_of_memory

    if out_of_memory(error):
        return "out of memory: add --low-memory, --dtype fp16 or a smaller --size"
    return str(error) if isinstance(error, ValueError | OSError | FloatingPointError) else None


if __name__ == "__main__":
    sys.exit(main())
