"""The text "parameters" of A1111's web UI and its viewers: written from our settings, and read from its images.

It is the prompt, "Negative prompt: ..." and a last line of "Name: value" pairs. Settings are the options of infer.py.
"""

import json
import re
from pathlib import Path

from controlnet.common.program import height_and_width
from controlnet.hints import options_of, parse_detector
from ldm.checkpoints.extras import split_strength

from .sampler_names import A1111_SAMPLERS

NEGATIVE = "Negative prompt:"

# Its ControlNet extension weighs layers by 0.825^n and leaves out the negative prompt in the mode in which "ControlNet
# is more important". Each of our modes gets the name of the nearest there.
MODES = {"balanced": "Balanced", "middle": "Balanced", "shuffle": "Balanced"}
OTHER_MODES = "ControlNet is more important"

FITS = {"stretch": "Just Resize", "crop": "Crop and Resize", "pad": "Resize and Fill"}

# What the extension calls our detectors, and which of our options are its thresholds A and B. All others are "none".
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
    lines.append(", ".join(f"{name}: {quoted(value)}" for name, value in pairs(settings).items() if value is not None))
    return "\n".join(lines)


def lora_tag(given: str) -> str:
    """A LoRA given by --lora, as A1111's prompts name one."""
    name, strength = split_strength(given)
    return f" <lora:{re.sub('[<>:]', ' ', Path(name).stem)}:{strength:g}>"


def pairs(settings: dict) -> dict[str, object]:
    """The pairs of the last line; those with None are left out of it."""
    sampler, schedule = A1111_SAMPLERS[settings["sampler"]]
    upscale = None if settings["upscale"] == 1 else settings["upscale"]
    return {
        "Steps": settings["steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": settings["cfg"],
        "Seed": settings["seed"],
        "Size": settings["size"],
        "Model": Path(settings["base"]).stem,
        "Denoising strength": settings["strength"] if settings["init"] else upscale and settings["upscale_strength"],
        "Hires upscale": upscale,
        "Hires upscaler": upscale and "Lanczos",
        "Mask blur": settings["mask_blur"] or None,
        "Inpaint area": None if settings["only_masked"] is None else "Only masked",
        "Masked area padding": settings["only_masked"],
        "Clip skip": None if settings["clip_skip"] == 1 else settings["clip_skip"],
        "Eta": settings["eta"],
        **{f"ControlNet {i}": unit(settings, i) for i in range(len(settings["hint"]))},
    }


def unit(settings: dict, i: int) -> str:
    """One ControlNet, as the extension writes it. It splits the text at "," and ": ", and drops the whole unit if it
    does not know a name or a mode, or a number is out of its range."""
    detector, options = settings["detect"][i].lower(), {}
    if detector not in ("none", "inpaint"):
        detector, given = parse_detector(detector)
        options = options_of(detector) | given
    module, *thresholds = MODULES.get(detector, ("none",))
    values = {
        "Module": module,
        "Model": re.sub("[,:\n]", " ", Path(settings["control"][i]).stem),
        "Weight": min(max(settings["control_scale"][i], 0.0), 2.0),
        "Resize Mode": FITS[settings["fit"]],
        "Processor Res": None if module == "none" else min(height_and_width(settings["size"])),
        **{f"Threshold {name}": options[option] for name, option in zip("AB", thresholds, strict=False)},
        "Guidance Start": settings["control_start"][i],
        "Guidance End": settings["control_end"][i],
        "Pixel Perfect": False,
        "Control Mode": MODES.get(settings["control_mode"][i], OTHER_MODES),
    }
    return ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)


def quoted(value: object) -> str:
    """As JSON if A1111's parser would take something in the value for its end or for another name."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n]|^"', text) else text


# -------------------------------------------------------------------------------------------------------------- reading

PAIR = re.compile(r'(?:^|,)\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)')

# Its names for our options.
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
SCHEDULES = ("Automatic", "Uniform", "Karras")


def read_parameters(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """-> our options, and whatever else the last line says, both as they are written.

    Any text is accepted: without a last line of pairs all of it is the prompt.
    """
    *lines, last = text.strip().split("\n")
    found = {pair[1]: unquoted(pair[2]) for pair in PAIR.finditer(last)}
    if len(found) < 3:
        lines, found = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    settings = {
        "prompt": "\n".join(line.strip() for line in lines[:start]),
        "negative": "\n".join(line.strip() for line in lines[start:]).removeprefix(NEGATIVE).strip(),
    }
    settings |= {ours: found.pop(theirs) for theirs, ours in OPTIONS.items() if theirs in found}
    if "upscale" in settings and "strength" in settings:  # then this is the strength of the second pass
        settings["upscale_strength"] = settings.pop("strength")
    if "sampler" in settings and found.get("Schedule type") in SCHEDULES:
        settings["sampler"] = with_schedule(settings["sampler"], found.pop("Schedule type"))
    return settings, found


def with_schedule(sampler: str, schedule: str) -> str:
    """The sampler's name as older versions write it: with " Karras" if that is the schedule, as DPM++'s automatic one
    is."""
    karras = schedule == "Karras" or (schedule == "Automatic" and sampler.startswith("DPM++"))
    return f"{sampler} Karras" if karras else sampler


def unquoted(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text.strip()
    except ValueError:
        return text
