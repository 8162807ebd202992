"""Numbers over a few seeds: means, standard deviations, and when two differ. Nothing here imports PyTorch."""

from collections.abc import Sequence
from math import hypot
from statistics import fmean, stdev
from typing import NamedTuple

# Row of a table -> measure -> its values, one for each seed.
Numbers = dict[str, dict[str, list[float]]]

LEAST = 0.02  # a smaller difference of IoUs counts for none, however small the deviations


class Verdict(NamedTuple):
    """What came out beside the paper's claim."""

    agrees: bool
    why: str


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation, or the only value."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def above(high: Sequence[float], low: Sequence[float]) -> bool:
    """Whether one mean is above the other by more than chance explains: by the standard deviation of their difference,
    for single values by `LEAST`."""
    spread = hypot(*(stdev(values) for values in (high, low) if len(values) > 1))
    return fmean(high) - fmean(low) > max(spread, LEAST)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown: the first column is text, all others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def numbers_table(numbers: Numbers, columns: dict[str, str], first: str = "") -> str:
    """A row for each in `numbers`; `columns` are measures with their titles."""
    rows = [[name, *(shown(row[measure]) for measure in columns)] for name, row in numbers.items()]
    return table([first, *columns.values()], rows)
