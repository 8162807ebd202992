"""The text "parameters" of A1111's web UI and its viewers: written of our settings, and read of its own images.

It is the prompt, "Negative prompt: ..." and a last line of "Name: value" pairs. Settings are the options of infer.py by
their names (options.py).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from controlnet.hints import options_of, parse_detector
from ldm.checkpoints.extras import split_strength

from .sampler_names import A1111_SAMPLERS

NEGATIVE = "Negative prompt:"

# Its ControlNet extension weighs layers by 0.825^n and spares the negative prompt in the mode in which ControlNet is
# more important, its guess mode; our other modes have the name of the nearest.
MODES = {"balanced": "Balanced", "middle": "Balanced", "shuffle": "Balanced"}
OTHER_MODES = "ControlNet is more important"

FITS = {"stretch": "Just Resize", "crop": "Crop and Resize", "pad": "Resize and Fill"}

# What the extension calls our detectors, and which of our options are its thresholds A and B. The others read what is a
# hint by then: for it they are "none".
MODULES = {
    "canny": ("canny", "low", "high"),
    "scribble": ("invert (from white bg & black line)",),
    "invert": ("invert (from white bg & black line)",),
    "threshold": ("threshold", "threshold"),
    "blur": ("blur_gaussian", "sigma"),
    "tile": ("tile_resample", "factor"),
    "shuffle": ("shuffle",),
    "hed": ("softedge_hed",),
    "mlsd": ("mlsd", "score", "distance"),
    "midas": ("depth_midas",),
    "openpose": ("openpose",),
    "lineart": ("lineart_realistic",),
    "inpaint": ("inpaint_only",),
}


# -------------------------------------------------------------------------------------------------------------- writing


def parameters(settings: dict) -> str:
    lines = [settings["prompt"] + "".join(map(lora_tag, settings["lora"]))]
    if settings["negative"]:
        lines.append(f"{NEGATIVE} {settings['negative']}")
    lines.append(", ".join(f"{name}: {quoted(value)}" for name, value in pairs(settings)))
    return "\n".join(lines)


def lora_tag(given: str) -> str:
    """Of a LoRA that was given by --lora."""
    name, strength = split_strength(given)
    return f" <lora:{re.sub('[<>:]', ' ', Path(name).stem)}:{strength:g}>"


def pairs(settings: dict) -> Iterator[tuple[str, object]]:
    yield "Steps", settings["steps"]
    sampler, schedule = A1111_SAMPLERS[settings["sampler"]]
    yield "Sampler", sampler
    if schedule:
        yield "Schedule type", schedule
    yield "CFG scale", settings["cfg"]
    yield "Seed", settings["seed"]
    yield "Size", settings["size"]
    yield "Model", Path(settings["base"]).stem
    if settings["init"]:
        yield "Denoising strength", settings["strength"]
    elif settings["upscale"] != 1:
        yield "Denoising strength", settings["upscale_strength"]
    if settings["upscale"] != 1:
        yield "Hires upscale", settings["upscale"]
        yield "Hires upscaler", "Lanczos"
    if settings["mask_blur"]:
        yield "Mask blur", settings["mask_blur"]
    if settings["only_masked"] is not None:
        yield "Inpaint area", "Only masked"
        yield "Masked area padding", settings["only_masked"]
    if settings["clip_skip"] != 1:
        yield "Clip skip", settings["clip_skip"]
    yield "Eta", settings["eta"]
    for i in range(len(settings["hint"])):
        yield f"ControlNet {i}", ", ".join(f"{name}: {value}" for name, value in unit(settings, i))


def unit(settings: dict, i: int) -> Iterator[tuple[str, object]]:
    """One ControlNet, as the extension writes it. It splits at "," and ": ", knows no other names, modes and ranges,
    and where one thing does not fit drops the whole unit."""
    detector, options = settings["detect"][i].lower(), {}
    if detector not in ("none", "inpaint"):
        detector, given = parse_detector(detector)
        options = options_of(detector) | given
    module, *thresholds = MODULES.get(detector, ("none",))
    yield "Module", module
    yield "Model", re.sub("[,:\n]", " ", Path(settings["control"][i]).stem)
    yield "Weight", min(max(settings["control_scale"][i], 0.0), 2.0)
    yield "Resize Mode", FITS[settings["fit"]]
    if module != "none":
        yield "Processor Res", min(map(int, settings["size"].split("x")))
    for name, option in zip("AB", thresholds, strict=False):
        yield f"Threshold {name}", options[option]
    yield "Guidance Start", settings["control_start"][i]
    yield "Guidance End", settings["control_end"][i]
    yield "Pixel Perfect", False
    yield "Control Mode", MODES.get(settings["control_mode"][i], OTHER_MODES)


def quoted(value: object) -> str:
    """As JSON where a comma, a colon or a line's end would end the value or begin a name for A1111's parser."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n]|^"', text) else text


# -------------------------------------------------------------------------------------------------------------- reading

PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)')

# Its names for our options. What it says of others is no option here.
OPTIONS = {
    "Steps": "steps",
    "Sampler": "sampler",
    "CFG scale": "cfg",
    "Seed": "seed",
    "Size": "size",
    "Clip skip": "clip_skip",
    "Denoising strength": "strength",
    "Hires upscale": "upscale",
    "Mask blur": "mask_blur",
    "Masked area padding": "only_masked",
    "Model": "base",
}


READ_SCHEDULES = ("Automatic", "Uniform", "Karras")


def read_parameters(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """-> the settings that are options of ours, and what else the last line says, both as they are written.

    Any text is accepted: one without a last line of pairs is a prompt.
    """
    *lines, last = text.strip().split("\n")
    found = dict(read_pairs(last))
    if len(found) < 3:
        lines, found = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    settings = {
        "prompt": "\n".join(line.strip() for line in lines[:start]),
        "negative": "\n".join(line.strip() for line in lines[start:]).removeprefix(NEGATIVE).strip(),
    }
    settings |= {ours: found.pop(theirs) for theirs, ours in OPTIONS.items() if theirs in found}
    if "upscale" in settings and "strength" in settings:  # which is the second pass's then
        settings["upscale_strength"] = settings.pop("strength")
    if "sampler" in settings and found.get("Schedule type") in READ_SCHEDULES:
        settings["sampler"] = with_schedule(settings["sampler"], found.pop("Schedule type"))
    return settings, found


def with_schedule(sampler: str, schedule: str) -> str:
    """The sampler's name, with " Karras" where that is its schedule, as older versions write it."""
    karras = schedule == "Karras" or (schedule == "Automatic" and sampler.startswith("DPM++"))
    return f"{sampler} Karras" if karras else sampler


def read_pairs(line: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(line):
        if pair := PAIR.match(line, position):
            yield pair[1], unquoted(pair[2])
        comma = line.find(",", pair.end() if pair else position)
        position = comma + 1 if comma >= 0 else len(line)


def unquoted(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text.strip()
    except ValueError:
        return text
