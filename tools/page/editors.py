"""What the editors of the second tab hold -> options of infer.py. Each holds a background, layers that a brush painted,
and a composite of all: Pillow's images of mode RGBA."""

from pathlib import Path

from PIL import Image

from controlnet.common.image_files import ground_of_hint, to_rgb
from controlnet.common.images import to_uint8
from controlnet.common.program import from_json, height_and_width
from controlnet.hints.hint_image import HintImage
from controlnet.inference.options import Options
from controlnet.inference.sizes import check_size, default_size
from ldm.checkpoints.recognise import open_base

from .studio import BY_HINT, Studio

SHORT_SIDE = 512  # to which hints are enlarged for the brush, by whole pixels
FROM_NOISE, FROM_PHOTO, PAINTED = "noise", "the photograph", "the photograph, for what is painted"


def detected(source: str, detect: str, base: str, size: str) -> Image.Image:
    """The hint as `base` gets it, enlarged."""
    config, image = open_base(base).config, HintImage.of(Path(source), detect)
    size = from_json(Options, {"size": size or None}, "the form")["size"]
    wanted = height_and_width(size) if size else default_size(config, image.image)
    check_size(config, wanted)
    found = Image.fromarray(to_uint8(image.at(wanted)[0]))
    by = -(-SHORT_SIDE // min(found.size))
    return found.resize((found.width * by, found.height * by), Image.Resampling.NEAREST)


def begun_from(studio: Studio, photo: dict, start: str, strength: float, around: bool) -> dict:
    if start == FROM_NOISE:
        return {}
    init = studio.keep(background(photo, f'to begin from "{start}" one is needed: drop it'))
    given = dict(init=init, strength=strength)
    if start == PAINTED:
        mask = painted(photo)
        if mask is None:
            raise ValueError("nothing is painted in the photograph: paint with the brush what is to be made anew")
        given |= dict(mask=studio.keep(mask), only_masked=32 if around else None)
    return given


def hints_of(studio: Studio, parts: list[list]) -> dict:
    """Of the controls that have a hint."""
    parts = [part for part in parts if part[0] and part[0]["composite"] and part[0]["composite"].getbbox()]
    if not parts:
        return {}
    hints, names, scales, starts, ends, places = zip(*parts, strict=True)
    given = dict(hint=[studio.keep(to_rgb(hint["composite"], ground_of_hint)) for hint in hints])
    given |= dict(control_scale=list(scales), control_start=list(starts), control_end=list(ends))
    masks = [painted(place) for place in places]
    given |= dict(control_mask=[mask and studio.keep(mask) for mask in masks] if any(masks) else [])
    return given | dict(control=[None if name == BY_HINT else name for name in names])


def dropped(editor: dict | None) -> bool:
    return bool(editor and editor["background"] and editor["background"].getbbox())


def background(editor: dict | None, otherwise: str) -> Image.Image:
    """Raises ValueError with that sentence if nothing was dropped there."""
    if not dropped(editor):
        raise ValueError(otherwise)
    return to_rgb(editor["background"])


def painted(editor: dict | None) -> Image.Image | None:
    """White where the brush has been, mode L; None if it has not been anywhere."""
    if not editor or not editor["layers"]:
        return None
    layer = editor["layers"][0]  # the only one that there can be
    return layer.getchannel("A").point(lambda alpha: 255 * (alpha > 127)) if layer.getbbox() else None
