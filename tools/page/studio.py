"""What the page makes pictures with: infer.py's own run, told step by step, one picture after the other."""

import hashlib
import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import NamedTemporaryFile
from threading import Event, Thread, get_ident

from PIL import Image

from controlnet.common.errors import in_a_sentence
from controlnet.common.images import save_png
from controlnet.common.program import from_json
from controlnet.inference import run
from controlnet.inference.again import FILES
from controlnet.inference.memory import bytes_held
from controlnet.inference.options import Options
from controlnet.inference.png_text import png_texts
from controlnet.inference.progress import Progress
from controlnet.inference.saving import save_image
from ldm.stable_diffusion import StableDiffusion

BY_HINT = "by the hint"  # in place of a ControlNet's name
PREVIEW_EVERY = 3  # steps
LOOKED_BACK = 10  # pictures that were made before
# What a base is loaded by: as long as these stay the same, the one in memory serves.
LOADED_BY = ("base", "prediction", "zero_snr", "vae", "lora", "embedding", "precision", "low_memory")


@dataclass(frozen=True)
class Told:
    """One thing at a time: a step that is done, with a look at the picture; a finished one's file; or a sentence."""

    step: int = 0
    steps: int = 0
    preview: Image.Image | None = None
    picture: Path | None = None
    note: str = ""


class Stopped(Exception):
    """The picture is cancelled, or nobody waits for it any more."""


class Studio:
    """One base in memory, and one picture at a time. Pictures go into `folder`, what they are made from into inputs/
    there, so that each can be made again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base: tuple[str, StableDiffusion] | None = None
        self.asked: SimpleQueue[tuple[dict, SimpleQueue, Event]] = SimpleQueue()
        self.making: list[tuple[str, SimpleQueue, Event]] = []  # for whom, what is told, and what stops it
        Thread(target=self.work, daemon=True).start()

    def keep(self, image: Image.Image) -> str:
        """The file of an image that a picture is made from: the same image has the same file."""
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
        path = self.folder / "inputs" / f"{hashlib.sha256(content).hexdigest()[:16]}.png"
        if not path.exists():
            save_png(image, path, {})
        return str(path)

    def made(self) -> list[Path]:
        """The newest pictures in the folder, the last one first."""
        return sorted(self.folder.glob("[0-9]*.png"), key=lambda path: -path.stat().st_mtime)[:LOOKED_BACK]

    def make(self, given: dict, visitor: str = "") -> Iterator[Told]:
        """With options as infer.py's command line gives them. Who closes the iterator stops it at the next step."""
        told, stop = SimpleQueue(), Event()
        self.making.append(entry := (visitor, told, stop))
        self.asked.put((given, told, stop))
        try:
            while (one := told.get()) is not None:
                yield one
        finally:
            stop.set()
            self.making.remove(entry)

    def cancel(self, visitor: str) -> None:
        """Stops what is made for this visitor, or waits for its turn."""
        for whose, told, stop in self.making:
            if whose == visitor:
                stop.set()
                told.put(Told(note="cancelled"))
                told.put(None)

    def work(self) -> None:
        """One picture after the other, for ever."""
        while True:
            given, told, stop = self.asked.get()
            try:
                with redirect_stderr(Notes(told)):
                    self.draw(given, told, stop)
            except Stopped:
                pass
            except Exception as error:
                told.put(Told(note=sentence_of(error)))
            told.put(None)

    def draw(self, given: dict, told: SimpleQueue, stop: Event) -> None:
        def watch(done: Progress) -> None:
            if stop.is_set():
                raise Stopped
            shown = done.step % PREVIEW_EVERY == 0 and done.step < done.steps
            told.put(Told(done.step, done.steps, done.preview() if shown else None))

        if stop.is_set():
            return
        typed = from_json(Options, given, "the form")
        held = bytes_held(self.base[1]) if self.base else 0
        jobs = run.prepare(*run.with_recorded({**typed, "out": self.folder}), held)
        jobs = run.load_jobs(jobs, self.loaded(jobs[0]))
        for job, i, image in run.make_images(jobs, self.base[1], watch):
            if stop.is_set():  # since its last step
                return
            path = save_image(image, self.folder, i, job.options.count, png_texts(job.settings(i)))
            told.put(Told(picture=path))

    def loaded(self, job: run.Job) -> StableDiffusion:
        """The base in memory, if it is the one that is asked for."""
        options = job.options
        asked = {name: getattr(options, name) for name in LOADED_BY}
        files = {name: job.files[name] for name in (options.base, options.vae, *job.extras.files) if name}
        key = str((asked, files, job.device))
        if self.base is None or self.base[0] != key:
            self.base = None  # first: two would not fit
            self.base = key, run.load_base(job)
        return self.base[1]

    def options_of(self, picture: str) -> tuple[Options, str]:
        """Those with which infer.py made it, or as many as A1111 tells; and, if the files that it names are left out,
        why: as with --again they may lie beside the page's pictures, in weights/ and in assets/, and nowhere else.

        Raises ValueError for a picture that does not tell.
        """
        without, why = {name: getattr(Options(), name) for name in FILES}, ""
        with NamedTemporaryFile(dir=self.folder, prefix=".", suffix=".png") as beside:
            beside.write(Path(picture).read_bytes())
            beside.flush()
            for given in ({}, without):
                try:
                    return run.with_recorded({"again": beside.name, **given})[0], why
                except ValueError as error:
                    why = str(error).replace(beside.name, Path(picture).name)
        raise ValueError(why)


class Notes(io.TextIOBase):
    """What this thread says on stderr, line by line; what others say goes where it went."""

    def __init__(self, told: SimpleQueue):
        self.told, self.begun, self.thread, self.others = told, "", get_ident(), sys.stderr

    def write(self, text: str) -> int:
        if get_ident() != self.thread:
            return self.others.write(text)
        *lines, self.begun = (self.begun + text).split("\n")
        for line in filter(str.strip, lines):
            self.told.put(Told(note=in_the_pages_words(line)))
        return len(text)


def sentence_of(error: Exception) -> str:
    advice = "choose a smaller size or base, or close other programs"
    sentence = in_a_sentence(error, advice) or f"this should not happen, please report it: {error!r}"
    return in_the_pages_words(sentence)


def in_the_pages_words(sentence: str) -> str:
    """A visitor knows neither options nor the name under which the studio keeps an image."""
    sentence = re.sub(r'"[^"]*/inputs/[0-9a-f]{16}\.png"', "the image", sentence)
    return sentence.replace("--control ", "ControlNet ").replace(" --", " ")
