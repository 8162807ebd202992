"""--again: the options of the image that is to be made again, and the files that it may open.

Anyone may have made that image, so it may open only files in weights/ and assets/ and beside itself.
"""

import glob
import os
from pathlib import Path

from controlnet.common.program import flag_of, from_json, note
from ldm.checkpoints import published
from ldm.checkpoints.extras import LORAS, find_extra, split_strength
from ldm.checkpoints.stored import first_few
from ldm.config import PRESETS

from .a1111 import read_parameters
from .options import ALWAYS_RECORDED, RECORDED, Options
from .png_text import read_texts
from .prompts import LORA_TAG
from .sampler_names import A1111_SAMPLERS, sampler_name

ROOT = Path(__file__).resolve().parents[2]
# The options that name files.
FILES = ("base", "vae", "lora", "embedding", "control", "hint", "init", "mask", "control_mask")
LONGEST_NAME = 1000


def with_recorded(given: dict) -> tuple[Options, dict[str, str]]:
    """The options as given, otherwise as the image for --again records them, and the fingerprints of its files.

    Raises ValueError for an image that does not say how it was made, or that names files it may not open.
    """
    path = given.get("again")
    if path is None:
        return Options(**given), {}
    recorded, text = read_texts(path)
    if recorded is None and text is None:
        raise ValueError(f'"{path}" does not say how it was made: give a PNG that infer.py made')
    values, files = of_ours(path, recorded) if recorded is not None else (of_a1111(path, text, given), {})
    if given.get("upscale") == 1:  # without the second pass
        values.pop("upscale_strength", None)
    values = from_json(Options, {name: value for name, value in values.items() if name not in given}, f'"{path}"')
    return Options(**relocated(path, values, files, given.get("trust", False)), **given), files


def of_ours(path: str, recorded: dict) -> tuple[dict, dict[str, str]]:
    if "dtype" in recorded:  # in older images
        recorded = {"precision": recorded["dtype"], **recorded}
    missing = [name for name in ALWAYS_RECORDED if name not in recorded]
    if missing:
        raise ValueError(f'"{path}" was made by another version of infer.py, which did not know {", ".join(missing)}')
    files = recorded.get("files")
    if not isinstance(files, dict):
        raise ValueError(f'"{path}" has no "files" like those that infer.py records: give a PNG that it made')
    return {name: recorded[name] for name in RECORDED if name in recorded}, dict(files)


# -------------------------------------------------------------------------------------------------------------- A1111's


def of_a1111(path: str, text: str, given: dict) -> dict:
    """The options in A1111's text. A note says what else it names."""
    values, others = read_parameters(text)
    note(f'"{path}" was not made by infer.py, whose noise differs: the image will be similar at best')
    model = values.pop("base", None)
    if model and "base" not in given:
        files = published.places_of(model, published.WEIGHTS) if Path(model).name == model else ()
        found = next((str(file) for file in files if file.is_file()), None)
        if found:
            values["base"] = found
        else:
            note(f'its model "{model}" is not in {published.WEIGHTS}: taking the base "{Options.base}" (see --base)')
    values["sampler"] = sampler_name(values.get("sampler", ""))
    if values["sampler"] not in A1111_SAMPLERS and "sampler" not in given:
        found = values.pop("sampler")
        what = f'there is no sampler "{found}" here' if found else "it names no sampler"
        note(f'{what}: taking "{Options.sampler}" (see --sampler)')
    for name, needed in {"strength": "init", "mask_blur": "mask", "only_masked": "mask"}.items():
        if name in values and needed not in given:
            others[name] = values.pop(name)
    for name in ("prompt", "negative"):
        for tag in LORA_TAG.finditer(values[name]):
            if name == "negative" or find_extra(tag[1].strip(), LORAS) is None:
                values[name] = values[name].replace(tag[0], "").strip()
                others[f"LoRA {tag[1]}"] = ""
    if others:
        note(f"not taken from it: {first_few(others, 20)}")
    return values


# ---------------------------------------------------------------------------------------------------------------- files


def relocated(path: str, values: dict, files: dict[str, str], trust: bool) -> dict:
    """The values with files named as they are found from here; `files` gets these names as further keys."""

    def found(option: str, name: str) -> str:
        file = split_strength(name)[0] if option == "lora" else name
        place = located(path, option, file, trust)
        if file in files:
            files[place] = files[file]
        return place + name.removeprefix(file)

    named = {option: values[option] for option in FILES if values.get(option)}
    names = [name for value in named.values() for name in (value if isinstance(value, list) else [value]) if name]
    if names:
        note(f'"{path}" names these files: {first_few(dict.fromkeys(names), 20)}')
    for option, value in named.items():
        one_each = isinstance(value, list)
        named[option] = [name and found(option, name) for name in value] if one_each else found(option, value)
    return values | named


def located(path: str, option: str, name: str, trust: bool) -> str:
    """Where to open a file that the image at `path` names, or its bare name, which is looked up later."""
    if option in ("base", "vae") and name in PRESETS:
        return name
    if len(name) > LONGEST_NAME:
        raise ValueError(f'"{path}" names a file with {len(name)} characters: give {flag_of(option)} yourself')
    folder = Path(path).absolute().parent
    roots = [folder, published.WEIGHTS, ROOT / "assets"]
    for place in map(os.path.abspath, (folder / name, name, ROOT / name, published.WEIGHTS / name)):
        if any(Path(place).is_relative_to(root) for root in roots) and is_there(Path(place)):
            return name if place == os.path.abspath(name) else place
    several = option == "hint" and (glob.has_magic(name) or Path(name).is_dir())  # infer.py records single files
    if not trust and (Path(name).name != name or is_there(Path(name)) or several):
        raise ValueError(
            f'"{path}" names "{name}" for {flag_of(option)}, which is neither in weights/ or assets/ nor beside it: '
            f"give {flag_of(option)} yourself, or add --trust if you know the file"
        )
    return name


def is_there(path: Path) -> bool:
    """A file, or a folder that is a model or a training run."""
    return any(os.path.isfile(path / name) for name in (".", "config.json", "model_index.json", "settings.json"))
