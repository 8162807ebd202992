"""Where a run reports, step by step."""

import math

from tqdm import tqdm

from .convergence import Convergence
from .later import Later
from .loggers import open_loggers
from .options import TrainSettings
from .report import Curves, scalars, write_report
from .run_state import RunFolder

# What a line says of a validation or a grid, as far as it was measured.
PRINTED = {
    "validation_loss": "validation loss {:.4f}",
    "control_measure": "control measure {:+.2%}",
    "iou": "iou {:.3f}",
    "keypoint_distance": "keypoint_distance {:.3f}",
}


class Progress:
    """Where a run reports: the progress bar, printed lines, log.jsonl, report.html, and what --log asks for."""

    def __init__(self, run: RunFolder, settings: TrainSettings, start: int):
        self.run, self.steps = run, settings.steps
        self.curves, self.convergence = Curves(), Convergence(settings.steps)
        for values in run.logged():  # before it was resumed
            self.take(values)
        self.loggers = open_loggers(settings, run)
        self.bar = tqdm(desc="train", total=settings.steps, initial=start, mininterval=1)
        self.loss = self.pace = None
        self.skipped = 0  # steps whose gradients were not finite
        self.shown: dict[str, str] = {}  # of the last validation
        self.unwritten: tuple[dict, Later] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        for logger in self.loggers:
            logger.close()

    def log(self, values: dict, numbers: Later) -> None:
        """`values` of one step: numbers, lists of numbers, and the name of a grid. `numbers` are its loss and its
        gradients' norm, which the device is still computing: the step before is written now, this one with the next
        `log` or `flush`."""
        self.flush()
        self.unwritten = values, numbers
        self.bar.update()

    def flush(self) -> None:
        if self.unwritten is not None:
            (values, numbers), self.unwritten = self.unwritten, None
            loss, gradient = numbers.read()
            self.write(values | {"loss": loss, "gradient": gradient, "skipped": int(not math.isfinite(gradient))})

    def write(self, values: dict) -> None:
        step = values["step"]
        self.run.log(values)
        news = self.take(values)
        self.show(values)
        if news:
            tqdm.write(news)
        for logger in self.loggers:
            logger.log(scalars(values), step)
            if "grid" in values:
                logger.show(self.run.grid(step), step)
        if "validation_loss" in values or "grid" in values or step == self.steps:
            write_report(self.run, self.curves, self.steps, self.convergence.set_in)

    def take(self, values: dict) -> str:
        """Adds them to the curves -> what there is to say of them."""
        self.curves.add(values)
        if "control_measure" not in values:
            return ""
        return self.convergence.news(values["step"], values["validation_loss"], values["control_measure"])

    def show(self, values: dict) -> None:
        """Shows numbers in the bar and, after a validation or a grid, prints a line."""
        self.loss = smoothed(self.loss, values["loss"])
        self.pace = smoothed(self.pace, 1 / values["images_per_second"])
        self.skipped += values["skipped"]
        if "validation_loss" in values:
            self.shown = {"validation": f"{values['validation_loss']:.4f}"}
            if "control_measure" in values:
                self.shown["control"] = f"{values['control_measure']:+.2%}"
        shown = {"loss": f"{self.loss:.4f}", "lr": f"{values['lr']:.1e}", "img/s": f"{1 / self.pace:.1f}"}
        memory = {"GB": f"{values['memory_gb']:.1f}"} if "memory_gb" in values else {}
        skipped = {"skipped": str(self.skipped)} if self.skipped else {}
        self.bar.set_postfix(shown | skipped | self.shown | memory, refresh=False)
        if measures := [text.format(values[name]) for name, text in PRINTED.items() if name in values]:
            tqdm.write(f"step {values['step']}: loss {self.loss:.4f}, {', '.join(measures)}")


def smoothed(before: float | None, now: float) -> float:
    """A loss that is not finite, whose step is skipped, counts only as long as no other is known."""
    if before is None or not math.isfinite(before):
        return now
    return 0.95 * before + 0.05 * now if math.isfinite(now) else before
