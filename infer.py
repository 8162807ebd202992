"""Images from a prompt and hints, with Stable Diffusion and ControlNets.

    python infer.py --hint circle.png --prompt "red circle with blue background"
    python infer.py --base sd15 --control canny --hint bird.jpg --detect canny --prompt "a bird" --count 4
    python infer.py --base sd15 --init photo.png --strength 0.6 --prompt "an oil painting"
    python infer.py --base sd15 --init photo.png --mask hole.png --only-masked --prompt "a cat"
    python infer.py --hint poses/ --seed -1
    python infer.py --again out/0001.png

Prints the path of each image. Each PNG carries all that makes it again, as A1111 and its viewers read it ("parameters")
and as JSON ("controlnet"), which --again reads.

Images that go in are brought to the size of the image made. Without --size its short side is the base's resolution
and each side a multiple of 64 (of 32 for tiny), in the shape of --init, else of the first hint. They are stretched to
it, or cropped or padded (--fit); smaller ones with Lanczos, larger ones by area. Transparent parts become white, or
black in hints with light lines; those of --init are made anew unless a --mask says what is.
"""

import re
import sys

from controlnet.common.program import add_options, new_parser, said_if_slow, share_cores
from controlnet.common.program import run as run_program
from controlnet.inference.options import Options


def main(argv: list[str] | None = None) -> int:
    share_cores()
    given = parse_args(argv)
    return run_program(
        "infer.py",
        lambda: infer(given),
        debug=given.get("debug", False),
        stopped="the images listed above, if any, are saved",
        memory_advice="add --low-memory, --precision fp16, a smaller --size or --batch-size",
    )


def parse_args(argv: list[str] | None = None) -> dict:
    """The options that are given, and no others."""
    parser = new_parser("python infer.py", __doc__)
    parser.usage = "%(prog)s [options]"
    add_options(parser, Options)
    given = vars(parser.parse_args(with_dashes(sys.argv[1:] if argv is None else argv)))
    if given.pop("guess", False):
        if "control_mode" in given:
            parser.error("--guess is short for --control-mode guess: give one of them")
        given["control_mode"] = ["guess"]
    return given


def with_dashes(argv: list[str]) -> list[str]:
    """A text may begin with a dash, which argparse takes for an option: --prompt -red is read as --prompt=-red."""
    joined = []
    for argument in argv:
        is_text = joined and joined[-1] in ("--prompt", "--negative") and re.match("-[^-]", argument)
        joined[-1:] = [f"{joined[-1]}={argument}"] if is_text else [*joined[-1:], argument]
    return joined


def infer(given: dict) -> None:
    with said_if_slow(f"loading {given.get('base', 'the model')} ..."):
        # Imported after parsing, because it takes seconds: --help does not need it.
        from controlnet.inference import run

        sd, jobs = run.load(run.prepare(*run.with_recorded(given)))
    for job, i, image in run.make_images(jobs, sd):
        run.save(job, i, image)


if __name__ == "__main__":
    sys.exit(main())
