"""What the page makes pictures with: infer.py's own run, told step by step, one picture after the other."""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Event, Thread

from PIL import Image

from controlnet.common.program import in_a_sentence
from controlnet.inference import run
from controlnet.inference.options import Options
from controlnet.inference.png_text import png_texts
from controlnet.inference.progress import Progress
from controlnet.inference.saving import save_image
from ldm.stable_diffusion import StableDiffusion

PREVIEW_EVERY = 3  # steps
MEMORY_ADVICE = "choose a smaller size, or the precision fp16"
# What a base is loaded by: as long as these stay the same, the one in memory serves.
LOADED_BY = ("base", "prediction", "zero_snr", "vae", "lora", "embedding", "precision")


@dataclass(frozen=True)
class Told:
    """One thing at a time: a look at the picture that is being made, a finished one's file, or a sentence."""

    preview: Image.Image | None = None
    picture: Path | None = None
    note: str = ""


class Stopped(Exception):
    """Nobody waits for the picture any more."""


class Studio:
    """One base in memory. `make` is called by one visitor at a time: the page's queue sees to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base: tuple[str, StableDiffusion] | None = None

    def make(self, given: dict) -> Iterator[Told]:
        """With options as infer.py's command line gives them. Who closes the iterator stops it at the next step."""
        told, stop = Queue(), Event()
        worker = Thread(target=self.work, args=(given, told, stop))
        worker.start()
        try:
            while (one := told.get()) is not None:
                yield one
        finally:
            stop.set()
            worker.join()

    def work(self, given: dict, told: Queue, stop: Event) -> None:
        def watch(done: Progress) -> None:
            if stop.is_set():
                raise Stopped
            if done.step % PREVIEW_EVERY == 0 and done.step < done.steps:
                told.put(Told(done.preview()))

        try:
            with redirect_stderr(Notes(told)):
                jobs = run.prepare(*run.with_recorded({**given, "out": self.folder}))
                jobs = run.load_jobs(jobs, self.loaded(jobs[0]))
                for job, i, image in run.make_images(jobs, self.base[1], watch):
                    path = save_image(image, self.folder, i, job.options.count, png_texts(job.settings(i)))
                    told.put(Told(picture=path))
        except Stopped:
            pass
        except Exception as error:
            told.put(Told(note=in_a_sentence(error, MEMORY_ADVICE, "") or f"an error of ours: {error!r}"))
        finally:
            told.put(None)

    def loaded(self, job: run.Job) -> StableDiffusion:
        """The base in memory, if it is the one that is asked for."""
        options = job.options
        asked = {name: getattr(options, name) for name in LOADED_BY}
        key = str((asked, job.files.get(options.base), job.extras, job.device))
        if self.base is None or self.base[0] != key:
            self.base = None  # first: two would not fit
            self.base = key, run.load_base(job)
        return self.base[1]


class Notes(io.TextIOBase):
    """What programs say on stderr, line by line."""

    def __init__(self, told: Queue):
        self.told, self.begun = told, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            if line.strip():
                self.told.put(Told(note=line))
        return len(text)


def options_of(picture: str) -> Options:
    """With which infer.py made it, or as far as A1111 tells. Raises ValueError if it does not tell."""
    return run.with_recorded({"again": picture})[0]
