"""The options of infer.py, each stated once. Nothing here imports PyTorch."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from controlnet.common.program import (
    FITS,
    PRECISION_HELP,
    PRECISION_NAMES,
    flag_of,
    not_negative,
    number,
    numbers,
    option,
    path_argument,
    positive,
    share,
    size_argument,
)
from controlnet.common.program import count as whole_number

from .sampler_names import sampler_name

MAX_HINTS = 32  # for one image

# The groups of --help. Options are recorded in the images made, except those marked `passing`, which belong to a call.
# Those marked `later` came after the first release: images without them were made with their defaults. Those marked
# `lacking` need not have a value for every hint.
HINTS = "hints and controls: once for all hints, or once for each"
in_image = partial(option, "what to make")
in_init = partial(option, "from an image")
in_hints = partial(option, HINTS, each=True)
in_model = partial(option, "model")
in_sampling = partial(option, "sampling")
in_run = partial(option, "run")


@dataclass(frozen=True)
class HintOptions:
    """One --hint and the options that belong to it, by their names."""

    hint: str
    detect: str = "none"
    control: str | None = None
    control_scale: float = 1.0
    control_layers: list[float] | None = None
    control_start: float = 0.0
    control_end: float = 1.0
    control_mask: str | None = None
    control_mode: str = "balanced"


@dataclass(frozen=True)
class Options:
    debug: bool = option("", "show where an error comes from", False, passing=True)

    prompt: str = in_image(
        "what the image shows; (word), (word:1.3) and [word] count more or less, BREAK begins a new chunk of 75 "
        r"tokens, \( is a bracket (default: empty)",
        "",
        metavar="TEXT",
    )
    negative: str = in_image("what it should not show (default: empty)", "", metavar="TEXT")
    size: str | None = in_image(
        "pixels, a side or width x height (default: near the base's resolution, in the shape of --init or of the first "
        "hint)",
        type=size_argument,
        metavar="N|WxH",
    )
    fit: str = in_image(
        "how images that go in are brought to the size: stretch, crop (covering it) or pad (within it; default: "
        "%(default)s)",
        "stretch",
        choices=FITS,
        later=True,
    )
    count: int = in_image("how many images (default: %(default)s)", 1, type=positive, metavar="N", passing=True)
    batch_size: int | None = in_image(
        "how many of them at once, which changes them by rounding alone (default: on CUDA as many as fit in memory, up "
        "to 16; else 1)",
        type=positive,
        metavar="N",
        later=True,
    )
    seed: int = in_image(
        "of the first image; each has the next; -1 draws one (default: %(default)s)", 0, type=int, metavar="N"
    )
    upscale: float = in_image(
        "make the image so many times as large in a second pass: it is enlarged (Lanczos) and made anew in part, with "
        'the same controls ("hires fix"; default: %(default)s, none)',
        1.0,
        type=number,
        metavar="X",
        later=True,
    )
    upscale_strength: float = in_image(
        "how much is made anew in the second pass (default: %(default)s)", 0.5, type=share, metavar="X", later=True
    )
    tile_diffusion: bool = in_image(
        "large images in little memory: denoise in overlapping tiles of the base's resolution. Not the image that one "
        "piece gives; --upscale, best with a tile control, holds the tiles together",
        False,
        later=True,
    )
    long_prompts: bool = in_image("read prompts of more than 75 tokens in chunks instead of cutting them", False)
    again: str | None = in_image(
        "make this image again with the options that it carries; others that are given replace them. Of A1111's images "
        "as far as they tell",
        metavar="FILE",
        passing=True,
    )
    trust: bool = in_image(
        "with --again: also open files that are neither in weights/ or assets/ nor beside the image",
        False,
        passing=True,
    )

    init: str | None = in_init("begin from this image (image-to-image)", metavar="FILE")
    strength: float | None = in_init(
        "how much is made anew: 0 keeps the image, 1 begins from noise (default: 0.75; with --mask 1)",
        type=share,
        metavar="X",
    )
    mask: str | None = in_init(
        "white is made anew, black is kept to the bit (inpainting); of the shape of --init. Also for --detect inpaint",
        metavar="FILE",
    )
    mask_blur: float = in_init(
        "makes the edges of --mask soft: standard deviation in pixels of --init (default: %(default)s)",
        0.0,
        type=not_negative,
        metavar="N",
        later=True,
    )
    only_masked: int | None = in_init(
        "make what is white in --mask and N pixels around it at the base's resolution, and put it back into --init, "
        "which keeps its size (N if left out: 32; without this option all of --init is made)",
        type=whole_number,
        const=32,
        metavar="N",
        later=True,
    )

    hint: list[str] = in_hints(
        "the image that steers: a file, or a name in assets/; a folder, or a pattern in quotes, for an image from each",
        metavar="FILE",
    )
    detect: list[str] = in_hints(
        "make the hint from the image: canny, canny:low=50,high=150, scribble, depth ... (`python -m tools.make_hints "
        "--help` lists them), inpaint with --mask, or none (default: none)",
        type=str.lower,
        metavar="NAME",
    )
    control: list[str] = in_hints(
        "a ControlNet, one for each hint: a file, or a name in weights/, also a short one (pose, canny); for tiny the "
        "hint tells it: limb colours are a pose, one thin white circle is a circle, other thin white lines are canny, "
        "white strokes scribble, ADE20K's colours seg, smooth gray depth",
        metavar="FILE",
        lacking=True,
    )
    control_scale: list[float] = in_hints(
        "how strongly it steers; 0 is not at all (default: 1)", type=number, metavar="X"
    )
    control_layers: list[list[float]] = in_hints(
        "and how strongly in each layer, 13 numbers for SD: encoder from fine to coarse, middle (default: all 1)",
        type=numbers,
        metavar="X,X,...",
        lacking=True,
    )
    control_start: list[float] = in_hints("from this part of the steps (default: 0)", type=share, metavar="X")
    control_end: list[float] = in_hints("to this part of the steps (default: 1)", type=share, metavar="X")
    control_mask: list[str] = in_hints(
        "where: white steers, black does not (default: everywhere)", metavar="FILE", lacking=True
    )
    control_mode: list[str] = in_hints(
        "balanced; prompt: not for the negative prompt, as all that follow but middle; guess: the earlier a layer, the "
        "weaker; resolution: the paper's weights 64/h, divided by 8; resolution-literal: not divided; shuffle: for "
        "shuffle models, whose layers are averaged over the image; middle: the middle layer alone (default: balanced)",
        metavar="NAME",
    )
    guess: bool = option(HINTS, "short for --control-mode guess, for all; a prompt is not needed", False, passing=True)

    base: str = in_model("a file, or sd15, sd21 ... in weights/ (default: %(default)s)", "tiny", metavar="FILE")
    prediction: str | None = in_model(
        "what the base predicts, where its file does not tell (default: v for an SD 2.x file of unknown name)",
        choices=("eps", "v"),
    )
    zero_snr: bool = in_model("the base was trained with zero terminal SNR and does not tell", False, later=True)
    vae: str | None = in_model(
        "another autoencoder, or one for a base without: the file or folder of a VAE", metavar="FILE", later=True
    )
    lora: list[str] = in_model(
        "a LoRA that is merged into the base, and how strongly (default: 1; may be below 0): a file, or a name in "
        "weights/. Several are given one by one; <lora:name:0.8> in the prompt does the same",
        metavar="FILE[:X]",
        each=True,
        later=True,
    )
    embedding: list[str] = in_model(
        "a textual inversion, which the prompts name by its file; those in weights/ and weights/embeddings/ need only "
        "be named",
        metavar="FILE",
        each=True,
        later=True,
    )
    clip_skip: int = in_model(
        "which layer of the text encoder is read, from the last: 2 for many anime models (default: %(default)s)",
        1,
        type=positive,
        metavar="N",
    )

    steps: int = in_sampling("of denoising (default: %(default)s)", 20, type=int, metavar="N")
    sampler: str = in_sampling(
        "ddim, ddpm, lcm (which wants an LCM LoRA, 4 to 8 steps and --cfg 1 to 2); dpm++, dpm++-sde, euler, euler-a, "
        "heun, unipc, each also with Karras' noise levels: dpm++-karras ... Other programs' names are read, too, like "
        '"DPM++ 2M Karras" or euler_ancestral (default: %(default)s)',
        "ddim",
        type=sampler_name,
        metavar="NAME",
    )
    cfg: float | None = in_sampling(
        "how much the prompt counts; 1 is no guidance (default: 7.5; tiny: 2.5)", type=number, metavar="X"
    )
    eta: float = in_sampling(
        "noise that ddim adds, from 0 to 1, which is as much as ddpm (default: %(default)s)",
        0.0,
        type=number,
        metavar="X",
    )
    reuse: int = in_sampling(
        "compute the ControlNets and all but two blocks of the UNet at every Nth step only: faster, but approximate; 2 "
        "is a good choice (default: %(default)s, exact)",
        1,
        type=positive,
        metavar="N",
    )

    out: Path = in_run(
        "a folder, where the next free number is taken (0001.png ...), or a file ending in .png, which is replaced "
        "(default: %(default)s)",
        Path("out"),
        type=path_argument,
        metavar="PATH",
        passing=True,
    )
    save_hint: bool = in_run("also save the hints as the model sees them, beside the first image", False, passing=True)
    device: str | None = in_run("cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)", metavar="NAME")
    precision: str | None = in_run(
        f"{PRECISION_HELP}. Latents are always fp32, and an autoencoder that overflows is run again in fp32 (default: "
        "fp16 with CUDA, else fp32)",
        choices=PRECISION_NAMES,
        older="--dtype",
    )
    compile: bool = in_run(
        "torch.compile for UNet and ControlNets: the first image of each size takes a minute or more longer, later "
        "ones are faster; all are the same to rounding",
        False,
        later=True,
    )
    low_memory: bool = in_run(
        "CPU offload: networks are on the device only while they are used; guidance in two passes, tiled VAE", False
    )


RECORDED = tuple(item.name for item in fields(Options) if not item.metadata.get("passing"))
ALWAYS_RECORDED = tuple(item.name for item in fields(Options) if not {"passing", "later"} & item.metadata.keys())


def options_for_each_hint(options: Options) -> list[HintOptions]:
    """Raises ValueError for an option given neither once for all hints nor once for each, and for too many hints."""
    count, columns = len(options.hint), {}
    if count > MAX_HINTS:
        raise ValueError(f"there are {count} --hint for one image, expected at most {MAX_HINTS}: leave some out")
    for item in fields(HintOptions):
        values, flag = getattr(options, item.name), flag_of(item.name)
        if values and count == 0:
            raise ValueError(f"there is a {flag} without a --hint: give a --hint, or leave it out")
        if len(values) not in (0, 1, count):
            raise ValueError(f"there are {len(values)} {flag} and {count} --hint, expected one for all or for each")
        if values:
            columns[item.name] = values * count if len(values) == 1 else values
    return [HintOptions(**{name: values[i] for name, values in columns.items()}) for i in range(count)]


def check_together(options: Options) -> None:
    """Raises ValueError for an option without another that it belongs to."""
    if options.control and len(options.control) != len(options.hint):
        found = f"{len(options.hint)} --hint and {len(options.control)} --control"
        raise ValueError(f"there are {found}, expected one --control for each --hint")
    if options.upscale_strength != Options.upscale_strength and options.upscale == 1:
        raise ValueError("there is an --upscale-strength without --upscale: say how many times as large it becomes")
    inpaint = "inpaint" in options.detect
    for name in ("strength", "mask", "mask_blur", "only_masked"):
        flag, given = flag_of(name), getattr(options, name) != getattr(Options, name)
        if given and options.init is None and not (name == "mask" and inpaint):
            raise ValueError(f"there is a {flag} without --init: give the image that it is for, or leave it out")
    if inpaint and options.mask is None:
        raise ValueError("--detect inpaint needs a --mask: white where the image is to be made anew")
