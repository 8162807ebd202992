"""The settings of train.py: each with its option, its default, its help, and whether it is fixed when a run resumes."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from controlnet.common.program import (
    DTYPE_NAMES,
    PRECISION_HELP,
    PRECISION_NAMES,
    add_options,
    count,
    flag_of,
    interval,
    limit,
    new_parser,
    option,
    path_argument,
    path_text,
    positive,
    positive_number,
    share,
    size_argument,
)

from .other_names import right_names
from .recipes import RECIPES

# What depends on the base if it is not given. For SD the optimizer, its learning rate and the batch are those of
# lllyasviel/ControlNet (docs/train.md); the intervals are ours, and so are `warmup` and `clip`, which that trainer does
# not have. For the small base what converges within minutes.
FULL_SIZE = dict(
    optimizer="adamw", lr=1e-5, lr_schedule="constant", batch_size=4, steps=10000, sample_every="250", save_every="10m"
)
LAPTOP = dict(
    optimizer="muon", lr=1e-3, lr_schedule="cosine", batch_size=16, steps=600, sample_every="50", save_every="250"
)


def by_base(name: str) -> str:
    return f"(default: {LAPTOP[name]} for tiny, {FULL_SIZE[name]} for SD)"


# The groups of --help; `fixed` settings are the run's own: resuming with another value is refused.
in_data = partial(option, "data", fixed=True)
in_method = partial(option, "method", fixed=False)
fixed_method = partial(option, "method", fixed=True)
in_machine = partial(option, "machine", fixed=False)
in_run = partial(option, "run", fixed=False)

# What an option takes, and how --help calls it.
NUMBER = dict(type=positive, metavar="N")
COUNT = dict(type=count, metavar="N")
FACTOR = dict(type=positive_number, metavar="X")
SHARE = dict(type=share, metavar="P")
INTERVAL = dict(type=interval, metavar="N|Nm")


@dataclass(frozen=True)
class TrainSettings:
    """`passing` settings belong to a call, not to the run: settings.json leaves them out."""

    debug: bool = option("", "show the traceback of an error", False, fixed=False, passing=True)

    data: str = in_data(
        "a folder of pairs (prompt.json, metadata.jsonl, .csv or .parquet, images/ hints/ captions/, sd-scripts' "
        "folders, images with .txt, tar shards), or a synthetic dataset: fill50k, people, shapes, scenes, canny, "
        "scribble, seg, depth, edits (default: %(default)s: data/fill50k if the published set lies there)",
        "fill50k",
        fixed=False,  # the same data may lie elsewhere by now: their fingerprint is compared
        type=path_text,
        metavar="NAME",
    )
    recipe: str | None = in_data(
        "settings for one of v1.1's controls: tile, inpaint (details, holes are painted anew), shuffle (colours are "
        "taken over) or ip2p (changes as the prompt says; --data needs pairs)",
        choices=[*RECIPES],
    )
    images: int | None = in_data("use the first N (default: all; of a synthetic dataset 2000)", **NUMBER)
    size: str | None = in_data(
        "training resolution in pixels (default: the base's own)", type=size_argument, metavar="N|WxH"
    )
    buckets: bool = in_data(
        "crop each image to the nearest of a few shapes with no more pixels than --size, one shape a batch; validation "
        "pairs to --size",
        False,
    )
    detect: str | None = in_data(
        "make the hints from the images: canny, canny:low=50, tile, inpaint (with a random hole) ...", metavar="NAME"
    )
    hint_channels: int = in_data(
        "of the hints: 1 gray, 3 RGB, 4 with opacity, any number from .npy files (default: %(default)s)", 3, **NUMBER
    )
    label_maps: bool = in_data("take the numbers of label maps (0, 1, 2 ...), black to the eye, as they are", False)
    random_crop: bool = in_data("crop at random, not in the centre (needs --no-cache)", False)
    flip: bool = in_data("mirror half of the pairs (needs --no-cache)", False)
    validation: int | None = in_data(
        "validation pairs, not trained on (default: 1 in 20, at most 32; of a synthetic dataset 32)", **COUNT
    )
    prompt: str | None = in_data("one prompt for all pairs, in place of captions; it may be empty", metavar="TEXT")
    prompt_dropout: float = in_data(
        "share of prompts replaced by the empty one; 1 needs no captions (default: %(default)s)",
        0.5,
        fixed=False,
        **SHARE,
    )
    bad_share: float = in_data(
        "stop if more than this share of samples cannot be used (default: %(default)s)", 0.01, fixed=False, **SHARE
    )
    cache: Path | None = in_data(
        "folder for cached latents, which runs on the same base can share (default: OUT/cache)",
        fixed=False,
        type=path_argument,
        metavar="DIR",
    )
    no_cache: bool = in_data("encode at each step; synthetic datasets are then endless", False)
    workers: int | None = in_data("data-loading processes (default: 0; with CUDA 4)", fixed=False, **COUNT)

    base: str = in_method(
        "the locked model: a file, or tiny, sd15, sd21 (default: %(default)s)", "tiny", metavar="FILE"
    )
    prediction: str | None = fixed_method(
        "what the UNet predicts, if an SD 2.x file does not say", choices=["eps", "v"]
    )
    zero_snr: bool = fixed_method("the base was trained with zero terminal SNR and does not tell", False)
    vae: str | None = fixed_method(
        "another autoencoder, or one for a base without: the file or folder of a VAE", metavar="FILE"
    )
    lora: list[str] = fixed_method(
        "a LoRA that is merged into the locked model, and how strongly (default: 1); several are given one by one",
        metavar="FILE[:X]",
        each=True,
    )
    control: str | None = fixed_method(
        "start from this ControlNet, not from a fresh copy: a file, a name in weights/, a run or one of its states",
        metavar="FILE",
    )
    architecture: str = fixed_method(
        "the paper's baselines: lite, single convolutions, not a copy; gaussian, no zero convolutions. And others: "
        "random, a copy without the base's weights; frozen, a copy that stays as it is; concat, no copy, the hint at "
        "the base's input",
        "full",
        choices=["full", "lite", "gaussian", "random", "frozen", "concat"],
    )
    steps: int | None = in_method(f"optimizer steps {by_base('steps')}", **NUMBER)
    epochs: float | None = in_method(
        "train for so many rounds through the data, in place of --steps", type=positive_number, metavar="N"
    )
    batch_size: int | None = in_method(f"images per batch and process {by_base('batch_size')}", **NUMBER)
    accumulate: int = in_method(
        "batches per optimizer step; from 2 on their gradients take memory beside the activations (default: "
        "%(default)s)",
        1,
        **NUMBER,
    )
    optimizer: str | None = fixed_method(
        f"adamw8bit needs bitsandbytes {by_base('optimizer')}", choices=["adamw", "adamw8bit", "muon"]
    )
    lr: float | None = in_method(f"the learning rate {by_base('lr')}", **FACTOR)
    warmup: int = in_method("steps up to the full learning rate (default: %(default)s)", 100, **COUNT)
    lr_schedule: str | None = in_method(
        "of the learning rate, which the warm-up holds down at first; all but constant fall to 0 at --steps "
        f"{by_base('lr_schedule')}",
        choices=["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"],
    )
    lr_cycles: int = in_method("how often cosine_with_restarts falls to 0 (default: %(default)s)", 3, **NUMBER)
    lr_power: float = in_method("of polynomial (default: %(default)s)", 2.0, **FACTOR)
    clip: float = in_method(
        "clip the norm of the gradients to this; the published trainer does not: inf (default: 1)",
        1.0,
        type=limit,
        metavar="X",
    )
    ema: float | None = fixed_method(
        "save an exponential moving average of the copy with this decay, e.g. 0.999", type=share, metavar="DECAY"
    )
    min_snr: float | None = in_method(
        "weigh the error in x0 by min(SNR, GAMMA), not by SNR; usually 5; not in the validation loss",
        type=positive_number,
        metavar="GAMMA",
    )
    sd_unlocked: bool = fixed_method("train the base's decoder too", False)
    only_mid_control: bool = fixed_method("control the middle block alone", False)
    global_average_pooling: bool = fixed_method("average what control adds over the image, as shuffle models do", False)
    seed: int = fixed_method("of all that is random (default: %(default)s)", 0, **COUNT)

    device: str | None = in_machine(
        "cpu, cuda, cuda:1 ... (default: cuda if there is one)", metavar="NAME", passing=True
    )
    precision: str = in_machine(
        f"{PRECISION_HELP}. What is trained stays fp32, and so does the loss (default: %(default)s)",
        "fp32",
        fixed=True,
        choices=PRECISION_NAMES,
    )
    checkpointing: bool = in_machine("gradient checkpointing: less memory for activations, more time", False)
    shard: bool = in_machine("AdamW's moments shared out among the processes of torchrun, not kept by each", False)
    deterministic: bool = in_machine("bit-identical runs on CUDA, too; slower", False)
    compile: bool = in_machine("torch.compile: slow to start, then faster", False)
    dry_run: bool = in_machine("print the plan, what it needs of memory and disk, train nothing", False, passing=True)
    fit: float | None = in_machine(
        "with --dry-run: also the largest batch size that fits into so many GB (10^9 bytes)",
        type=positive_number,
        metavar="GB",
        passing=True,
    )

    out: Path = in_run(
        "the run's folder (default: %(default)s)", Path("runs/control"), passing=True, type=path_argument, metavar="DIR"
    )
    resume: bool = in_run("go on with the run in --out, with its settings", False, passing=True)
    save_dtype: str = in_run("of the control's files (default: %(default)s)", "fp32", choices=DTYPE_NAMES)
    save_every: str | None = in_run(
        f"between saved states: steps, or minutes as in 10m {by_base('save_every')}", **INTERVAL
    )
    keep: int = in_run(
        "how many of the saved states and control-STEP.safetensors to keep (default: %(default)s)", 2, **NUMBER
    )
    validate_every: str = in_run("between validations, the same way (default: %(default)s)", "50", **INTERVAL)
    sample_every: str | None = in_run(f"between grids of images, the same way {by_base('sample_every')}", **INTERVAL)
    sample_count: int = in_run("images in a grid (default: %(default)s)", 8, **COUNT)
    validate: list[list[str]] = in_run(
        "a hint of your own and its prompt, shown in the grids; with --detect an image; several are given one by one",
        nargs=2,
        metavar=("HINT", "PROMPT"),
        each=True,
    )
    log: list[str] = in_run(
        "also log to tensorboard, wandb or trackio, a package of this name; several are given one by one",
        choices=["tensorboard", "wandb", "trackio"],
        each=True,
    )

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.out / "cache"


def parse_args(description: str, argv: list[str] | None = None) -> dict:
    """What the command line gives, by the settings' names. Ends the program after --help and for a mistake."""
    parser = new_parser("python train.py", description)
    add_options(parser, TrainSettings)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        sentence = right_names(unknown, [flag_of(item.name) for item in fields(TrainSettings)], "resume" in given)
        if sentence is None:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        parser.exit(2, f"train.py: {sentence}\n")
    return vars(given)
