"""Makes the README's strip of pictures with the small models: hints above, what they steer below.

python -m tools.strip --out assets/strip.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python tools/strip.py`

from controlnet import ControlNet
from controlnet.generate import generate
from controlnet.guidance import Control
from controlnet.images import save_png, to_hints
from controlnet.worlds import draw_circle
from ldm import StableDiffusion
from ldm.stable_diffusion import WEIGHTS

# x, y and radius in parts of the side, and the prompt. One seed for all: nothing is picked from many.
PICTURES = (
    (0.50, 0.50, 0.30, "red circle with white background"),
    (0.30, 0.35, 0.22, "yellow circle with navy background"),
    (0.70, 0.60, 0.36, "teal circle with pink background"),
    (0.45, 0.70, 0.15, "black circle with orange background"),
    (0.15, 0.50, 0.35, "violet circle with olive background"),
    (0.60, 0.40, 0.25, ""),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="a file or a preset (default: %(default)s)")
    parser.add_argument(
        "--control", type=Path, default=WEIGHTS / "tiny-fill50k.safetensors", help="a ControlNet's file"
    )
    parser.add_argument("--out", type=Path, default=Path("assets/strip.png"), help="(default: %(default)s)")
    args = parser.parse_args()

    sd = StableDiffusion.load(args.base)
    control = ControlNet.load(args.control, sd.unet)
    side = sd.config.resolution
    columns = []
    for x, y, radius, prompt in PICTURES:
        hint = draw_circle(side, x * side, y * side, radius * side, "white", "black").hint
        (picture,) = generate(sd, prompt, [Control(control, to_hints([hint]))], seed=0)
        columns.append(np.vstack([hint, np.asarray(picture)]))
    save_png(Image.fromarray(np.hstack(columns)), args.out, {})
    print(args.out)


if __name__ == "__main__":
    main()
