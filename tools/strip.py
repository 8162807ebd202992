"""Makes the README's picture with the small models: a row for each control, hints beside what comes of them.

python -m tools.strip --out assets/strip.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from controlnet import Control, ControlNet, generate
from controlnet.common.images import save_png, to_hints
from controlnet.common.program import new_parser, positive
from controlnet.training.previews import text_image
from controlnet.worlds import TINY_CONTROL_OF, WORLDS, Sample
from controlnet.worlds.colours import BASIC_COLOURS
from ldm import StableDiffusion
from ldm.checkpoints.published import WEIGHTS
from tools.cli import check_picture, run_tool

CAPTION = 54  # pixels below each pair


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.strip", __doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the folder of the models (default: weights/)")
    parser.add_argument("--columns", type=positive, default=3, help="samples a row (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("assets/strip.png"), help="(default: %(default)s)")
    return run_tool(parser, argv, make_strip)


def make_strip(args: argparse.Namespace) -> None:
    check_picture(args.out, "--out")
    sd = StableDiffusion.load(args.weights / "tiny.safetensors")
    rows = []
    for name, control_name in TINY_CONTROL_OF.items():
        path = args.weights / f"{control_name}.safetensors"
        if path.exists():
            control = ControlNet.load(path, sd.unet)
            # The first validation samples: none is hand-picked.
            world = WORLDS[name](sd.config.resolution, colours=BASIC_COLOURS, held_out=True)
            samples = tqdm([world[i] for i in range(args.columns)], desc=control_name)
            rows.append(np.hstack([pair(sd, control, sample) for sample in samples]))
    save_png(Image.fromarray(np.vstack(rows)), args.out, {})
    print(args.out)


def pair(sd: StableDiffusion, control: ControlNet, sample: Sample) -> np.ndarray:
    """uint8 (H + CAPTION, 2 W, 3): a hint, the image made from it and its caption, and the caption below."""
    (image,) = generate(sd, sample.caption, [Control.in_mode(control, to_hints([sample.hint]))])
    shown = np.hstack([sample.hint, image])
    return np.vstack([shown, text_image([sample.caption], (CAPTION, shown.shape[1]))])


if __name__ == "__main__":
    sys.exit(main())
