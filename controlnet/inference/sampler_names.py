"""The names of the samplers, here and in other programs. Nothing here imports PyTorch."""

import re

# The names of A1111 and its viewers, and the schedule type if it can be chosen there.
A1111_SAMPLERS = {
    "ddim": ("DDIM", None),
    "ddpm": ("DDPM", None),
    "dpm++": ("DPM++ 2M", "Uniform"),
    "dpm++-sde": ("DPM++ SDE", "Uniform"),
    "euler": ("Euler", "Uniform"),
    "euler-a": ("Euler a", "Uniform"),
    "heun": ("Heun", "Uniform"),
    "unipc": ("UniPC", None),
    "lcm": ("LCM", None),
    "dpm++-karras": ("DPM++ 2M", "Karras"),
    "dpm++-sde-karras": ("DPM++ SDE", "Karras"),
    "euler-karras": ("Euler", "Karras"),
    "euler-a-karras": ("Euler a", "Karras"),
    "heun-karras": ("Heun", "Karras"),
    "unipc-karras": ("UniPC", "Karras"),
}
# Other programs' names, as `sampler_name` reads them: ComfyUI's, diffusers' classes.
SAME_SAMPLERS = {
    "dpm++-sde": ("dpmppsde", "dpmsolversde"),
    "dpm++": ("dpmpp", "dpmpp2m", "dpmsolvermultistep"),
    "euler-a": ("eulera", "eulerancestral"),
    "unipc": ("unipc", "unipcbh2", "unipcmultistep"),
}


def sampler_name(text: str) -> str:
    """Our name for a sampler of A1111, ComfyUI or diffusers, in upper or lower case, with or without spaces; for any
    other text the text itself."""
    plain = re.sub(r"[\W_]", "", text.lower().replace("+", "p")).removeprefix("k").removesuffix("scheduler")
    base, karras = plain.removesuffix("karras").removesuffix("discrete"), "-karras" * plain.endswith("karras")
    names = {other: ours for ours, others in SAME_SAMPLERS.items() for other in others}
    name = names.get(base, base) + karras
    return name if name in A1111_SAMPLERS else text
