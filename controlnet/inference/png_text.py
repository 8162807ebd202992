"""What a saved image says about itself, as PNG text: the options that make it again, and A1111's "parameters".

`settings` are the options of infer.py by their names (options.py), as JSON: strings, numbers and lists of them. "files"
holds a fingerprint for each file that was used, by the name that was given.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

KEY = "controlnet"

# What A1111 and its viewers call the samplers.
A1111_SAMPLERS = {"ddim": "DDIM", "ddpm": "DDPM", "dpm++": "DPM++ 2M"}

# What its ControlNet extension calls our modes, where it has them.
A1111_MODES = {"balanced": "Balanced", "guess": "ControlNet is more important"}


def png_texts(settings: dict) -> dict[str, str]:
    return {"parameters": a1111_parameters(settings), KEY: json.dumps(settings, ensure_ascii=False)}


def read_settings(path: str | Path, names: Iterable[str]) -> dict:
    """The settings of an image that infer.py made. Raises ValueError if it is none, or lacks one of `names`."""
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f'"{path}" is not readable as an image ({error}): give a PNG that infer.py made') from error
    try:
        settings = json.loads(text)
    except (TypeError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f'"{path}" does not say how it was made: give a PNG that infer.py made')
    missing = [name for name in names if name not in settings]
    if missing:
        raise ValueError(f'"{path}" was made by another version of infer.py, which did not know {", ".join(missing)}')
    if not isinstance(settings.get("files"), dict):
        raise ValueError(f'"{path}" has no "files" like those that infer.py records: give a PNG that it made')
    return settings


# ---------------------------------------------------------------------------------------------------- A1111


def a1111_parameters(settings: dict) -> str:
    """The text that A1111 writes: prompt, negative prompt, and one line of "Name: value" pairs."""
    lines = [settings["prompt"]]
    if settings["negative"]:
        lines.append(f"Negative prompt: {settings['negative']}")
    lines.append(", ".join(f"{name}: {quoted(value)}" for name, value in a1111_pairs(settings)))
    return "\n".join(lines)


def a1111_pairs(settings: dict) -> Iterator[tuple[str, object]]:
    yield "Steps", settings["steps"]
    yield "Sampler", A1111_SAMPLERS[settings["sampler"]]
    yield "CFG scale", settings["cfg"]
    yield "Seed", settings["seed"]
    yield "Size", settings["size"]
    yield "Model", Path(settings["base"]).stem
    if settings["init"]:
        yield "Denoising strength", settings["strength"]
    if settings["clip_skip"] != 1:
        yield "Clip skip", settings["clip_skip"]
    yield "Eta", settings["eta"]
    for i, control in enumerate(settings["control"]):
        values = {
            "Module": settings["detect"][i],
            "Model": Path(control).stem,
            "Weight": settings["control_scale"][i],
            "Guidance Start": settings["control_start"][i],
            "Guidance End": settings["control_end"][i],
            "Control Mode": A1111_MODES.get(settings["control_mode"][i], settings["control_mode"][i]),
        }
        yield f"ControlNet {i}", ", ".join(f"{name}: {value}" for name, value in values.items())


def quoted(value: object) -> str:
    """As JSON where a comma or a colon would end the value or begin a name for A1111's parser."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


# ---------------------------------------------------------------------------------------------------- files


def fingerprint(path: str | Path) -> str:
    """A hash of a file's size and its first and last 16 MB, so that a base of 4 GB takes no time either. Of a folder,
    one of all files in it."""
    path, part = Path(path), 16 * 2**20
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(part))
            stream.seek(max(stream.tell(), size - part))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def fingerprints(used: dict[str, Path], recorded: dict[str, str]) -> dict[str, str]:
    """Of each file, by the name given. Raises ValueError if one that was recorded has changed."""
    found = {name: fingerprint(path) for name, path in used.items()}
    for name, value in found.items():
        if recorded.get(name, value) != value:
            raise ValueError(
                f'"{name}" is no longer the file that the image was made with: give that one by its option, or leave '
                "--again out"
            )
    return found
