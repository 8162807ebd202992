"""What an experiment is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from controlnet.training.charts import Points

from .lab import Lab
from .statistics import Verdict


@dataclass(frozen=True)
class Experiment:
    """`measure` gives numbers that JSON can hold. All else on the page is drawn from these, but for the sheets of
    samples that it saves beside them (`lab.save_sheet`)."""

    title: str
    claim: str  # the paper's, in a sentence
    how: str  # how it is tested here, and what of it holds for this small world alone
    measure: Callable[[Lab], dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[str]]  # as Markdown
    verdict: Callable[[dict[str, Any]], Verdict]
    charts: Callable[[dict[str, Any]], dict[str, dict[str, Points]]] = lambda numbers: {}  # title -> its curves
    settings: Callable[[Lab], dict[str, Any]] = lambda lab: {}  # its numbers hold for these, and for the lab's
