"""Where a run reports, step by step."""

import math

from tqdm import tqdm

from .later import Later
from .run_state import RunFolder


class Progress:
    """Where a run reports: the progress bar, log.jsonl and, if asked for and installed, TensorBoard."""

    def __init__(self, run: RunFolder, bar: tqdm, tensorboard: bool = False):
        self.run, self.bar, self.validation_loss, self.loss, self.pace = run, bar, None, None, None
        self.unwritten: tuple[dict, Later] | None = None
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run.path / "tensorboard")

    def log(self, values: dict, numbers: Later) -> None:
        """`values` of one step: numbers and lists of numbers, by name. `numbers` are its loss and its gradients' norm,
        which the device is still computing: the step before is written now, this one with the next `log` or `flush`."""
        self.flush()
        self.unwritten = values, numbers

    def flush(self) -> None:
        if self.unwritten is not None:
            (values, numbers), self.unwritten = self.unwritten, None
            loss, gradient = numbers.read()
            skipped = values["skipped"] + (not math.isfinite(gradient))
            self.write(values | {"loss": loss, "gradient": gradient, "skipped": skipped})

    def write(self, values: dict) -> None:
        self.run.log(values)
        step, pace = values["step"], 1 / values["images_per_second"]
        self.loss = smoothed(self.loss, values["loss"])
        self.pace = smoothed(self.pace, pace)
        self.validation_loss = values.get("validation_loss", self.validation_loss)
        shown = {"loss": f"{self.loss:.4f}", "lr": f"{values['lr']:.1e}", "img/s": f"{1 / self.pace:.1f}"}
        if self.validation_loss is not None:
            shown["validation"] = f"{self.validation_loss:.4f}"
        self.bar.set_postfix(shown | {"GB": f"{values['memory_gb']:.1f}"}, refresh=False)
        measures = [
            f"{name} {values[name]:.3f}" for name in ("validation_loss", "iou", "keypoint_distance") if name in values
        ]
        if "iou" in values:
            tqdm.write(f"step {step}: loss {self.loss:.4f}, {', '.join(measures)}")
        if self.board is not None:
            for name, value in values.items():
                for i, number in enumerate(value if isinstance(value, list) else [value]):
                    self.board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, number, step)


def smoothed(before: float | None, now: float) -> float:
    """Smooth enough to read."""
    return now if before is None else 0.95 * before + 0.05 * now
