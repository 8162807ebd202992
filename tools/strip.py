"""Makes the README's strip of pictures with the small models: hints, what they steer, and the prompts.

python -m tools.strip --out assets/strip.png
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # for `python tools/strip.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image
from tqdm import tqdm

from controlnet import ControlNet
from controlnet.common.images import save_png
from controlnet.training.preview import picture_for, written
from controlnet.worlds import TINY_CONTROL_OF, WORLDS, Sample
from controlnet.worlds.colours import BASIC_COLOURS
from ldm import StableDiffusion
from ldm.stable_diffusion import WEIGHTS

CAPTION = 64  # pixels below each column


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the folder of the models (default: weights/)")
    parser.add_argument("--columns", type=int, default=3, help="for each ControlNet (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("assets/strip.png"), help="(default: %(default)s)")
    args = parser.parse_args()

    sd = StableDiffusion.load(args.weights / "tiny.safetensors")
    columns = []
    for name, control_name in TINY_CONTROL_OF.items():
        path = args.weights / f"{control_name}.safetensors"
        if path.exists():
            control = ControlNet.load(path, sd.unet)
            # The first held-out samples: nothing is picked from many.
            world = WORLDS[name](sd.config.resolution, colours=BASIC_COLOURS, held_out=True)
            columns += [column(sd, control, world[i]) for i in tqdm(range(args.columns), desc=control_name)]
    save_png(Image.fromarray(np.hstack(columns)), args.out, {})
    print(args.out)


def column(sd: StableDiffusion, control: ControlNet, sample: Sample) -> np.ndarray:
    """uint8 (2 H + CAPTION, W, 3): a hint, the picture for it and its caption, and the caption."""
    caption = written([sample.caption], (CAPTION, sample.hint.shape[1]))
    return np.vstack([sample.hint, picture_for(sd, control, sample, seed=0), caption])


if __name__ == "__main__":
    main()
