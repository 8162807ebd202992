"""How much a run will write, and whether there is room for it."""

import io
import os
import shutil
from itertools import islice
from pathlib import Path

from controlnet.common.devices import PRECISIONS
from controlnet.common.program import free_place
from ldm.config import Config

from .memory import Prediction, optimizer_size
from .options import TrainSettings
from .simulation import bytes_of
from .sources import FolderSource, Source, good_samples
from .stored_latents import hint_as_image

LOOKED_AT = 4  # samples: their hints tell how large the file of a computed hint is


def disk_plan(config: Config, settings: TrainSettings, source: Source, prediction: Prediction) -> str:
    """A line with what the run's files will take and what is free. Raises ValueError if that is too little."""
    out, cache, needed = settings.out, settings.cache_folder, files_of_run(settings, prediction)
    written = [(out, sum(needed.values()) - size_of_folder(out / "state"))]
    if not settings.no_cache:
        needed = {"latents": latents_size(config, settings, source, prediction.size), **needed}
        written.append((cache, needed["latents"] - size_of_folder(cache)))
    check_room(written)
    free = shutil.disk_usage(free_place(settings.out.absolute())).free
    figures = ", ".join(f"{gigabytes(size)} for {what}" for what, size in needed.items())
    return f"on disk {figures}; {gigabytes(free)} are free"


def check_room(written: list[tuple[Path, int]]) -> None:
    """Raises ValueError if the bytes that will be written into each folder do not fit on the disks."""
    devices: dict[int, tuple[Path, int]] = {}
    for folder, size in written:
        place = free_place(folder.absolute())
        if not os.access(place, os.W_OK):
            raise ValueError(f'"{place}" may not be written to: give another folder as --out (for latents: --cache)')
        _, others = devices.get(place.stat().st_dev, (place, 0))
        devices[place.stat().st_dev] = place, others + max(size, 0)
    for place, size in devices.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise ValueError(
                f"the run will write {gigabytes(size)}, and {gigabytes(free)} are free in {place}: make room, give "
                "another folder as --out (for latents: --cache), keep fewer states (--keep), or add --no-cache"
            )


def files_of_run(settings: TrainSettings, prediction: Prediction) -> dict[str, int]:
    """Bytes of the states and their ControlNets, counting the new ones that are written before the oldest are removed,
    of the best ControlNet, and of an unlocked base."""
    run, stored = prediction.run, PRECISIONS[settings.save_dtype].itemsize
    control, decoder = bytes_of(run.loss.control), bytes_of(run.sd.unet.decoder) if settings.sd_unlocked else 0
    state = control * (2 if settings.ema else 1) + decoder + optimizer_size(run.loss, settings.optimizer)
    parameters = sum(parameter.numel() for parameter in run.loss.control.parameters())
    count, controls = settings.keep + 1, settings.keep + 2
    files = {f"{count} states": count * state, f"{controls} ControlNets": controls * stored * parameters}
    if settings.sd_unlocked:
        files["base.safetensors"] = stored * sum(parameter.numel() for parameter in run.sd.parameters())
    return files


def latents_size(config: Config, settings: TrainSettings, source: Source, size: tuple[int, int]) -> int:
    """Bytes of mean, logvar and text states, and of computed hints, judged by a few of them."""
    positions = size[0] * size[1] // config.vae.downscale**2
    numbers = 2 * config.vae.latent_channels * positions + config.text.positions * config.text.width
    # What sd-scripts' folders repeat is stored once.
    count = len(set(source.entries)) if isinstance(source, FolderSource) else len(source)
    return count * (PRECISIONS[settings.precision].itemsize * numbers + hint_size(source))


def hint_size(source: Source) -> int:
    if source.hints_are_files or source.uses_network:
        return 0
    sizes = []
    for sample in islice(good_samples(source), LOOKED_AT):
        with io.BytesIO() as file:
            hint_as_image(sample.hint).save(file, format="PNG")
            sizes.append(file.tell())
    return sum(sizes) // max(1, len(sizes))


def size_of_folder(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
