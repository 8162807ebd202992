"""The canvas of the page's first tab, and the hints that are made of what it sends."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from controlnet.common.image_files import read_image
from controlnet.hints.pose import COLOURS, LIMB_BRIGHTNESS, LIMBS, draw_pose
from controlnet.inference.inputs import find_hint
from controlnet.inference.options import Options

SIDE = 512  # pixels of the canvas
# Where a standing figure has its joints, as fractions of the side: x and y in the order of pose.KEYPOINTS.
STANDING = [
    [0.5, 0.2], [0.5, 0.32], [0.41, 0.32], [0.35, 0.44], [0.31, 0.56], [0.59, 0.32], [0.65, 0.44], [0.69, 0.56],
    [0.45, 0.56], [0.44, 0.72], [0.43, 0.88], [0.55, 0.56], [0.56, 0.72], [0.57, 0.88], [0.475, 0.18], [0.525, 0.18],
    [0.45, 0.2], [0.55, 0.2],
]  # fmt: skip
HTML = f"""
<canvas width="{SIDE}" height="{SIDE}" aria-label="drawing"></canvas>
<div class="tools">
  <label><input type="radio" name="mode" value="draw" checked> draw</label>
  <label><input type="radio" name="mode" value="pose"> pose</label>
  <label>pen <input class="width" type="range" min="3" max="24" value="5"></label>
  <button class="undo" type="button">undo</button>
  <button class="clear" type="button">clear</button>
</div>"""
CSS = """
canvas {
  display: block; margin: auto; width: 100%; max-width: 420px; aspect-ratio: 1;
  touch-action: none; cursor: crosshair; border-radius: 8px; outline: 1px solid gray;
}
.tools { display: flex; gap: 1em; align-items: center; flex-wrap: wrap; justify-content: center; padding-top: 0.5em; }
.tools button { margin: 0; }
.tools label { display: flex; gap: 0.4em; align-items: center; }
.tools .width { width: 5em; }
.tools input[type=radio] { border: 1px solid gray; }
"""
PNG = "data:image/png;base64,"


def parts() -> dict:
    """Of gradio's HTML component."""
    colours = [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in LIMB_BRIGHTNESS * COLOURS]
    script = Path(__file__).with_suffix(".js").read_text()
    data = dict(limbs=[list(limb) for limb in LIMBS], colours=colours, pose=STANDING)
    return dict(html_template=HTML, css_template=CSS, js_on_load=script, elem_id="sketch", **data)


def hint_of(sent: str) -> Image.Image:
    """The canvas's value. Raises ValueError for an empty one, and for anything else."""
    try:
        found = json.loads(sent)
        if "pose" in found:
            return Image.fromarray(draw_pose(np.array(found["pose"], float).reshape(18, 2) * SIDE, (SIDE, SIDE)))
        drawing = base64.b64decode(found["drawing"].removeprefix(PNG), validate=True)
        image = Image.open(io.BytesIO(drawing), formats=["PNG"]).convert("RGB").resize((SIDE, SIDE))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"the canvas sent no drawing and no pose ({error}): load the page again") from error
    if not image.getbbox():
        raise ValueError("nothing is drawn yet: draw on the black square first")
    return image


def sent_back(options: Options) -> str | None:
    """The hint that a picture was made from, as the canvas's value: None if there is none, or it is gone."""
    file = find_hint(options.hint[0]) if options.hint else None
    if file is None or not file.is_file() or set(options.detect) - {"none"}:  # a photograph is not a drawing
        return None
    drawn = io.BytesIO()
    read_image(file).save(drawn, "PNG")
    return json.dumps({"drawing": PNG + base64.b64encode(drawn.getvalue()).decode()})
