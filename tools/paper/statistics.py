"""Numbers over a few seeds: means, standard deviations, and when two differ. Nothing here imports PyTorch."""

from collections.abc import Sequence
from math import hypot
from statistics import fmean, stdev
from typing import NamedTuple

# Row of a table -> measure -> its values, one for each seed.
Numbers = dict[str, dict[str, list[float]]]

LEAST = 0.02  # of single values: a smaller difference of IoUs counts for none
LEARNED = 0.5  # the IoU from which on a full ControlNet follows its hints: below there is nothing to compare with


class Verdict(NamedTuple):
    """What came out beside the paper's claim; None if nothing can be said."""

    agrees: bool | None
    why: str


def judged(full: Sequence[float], agrees: bool, why: str) -> Verdict:
    """What the numbers say, if the full ControlNet, whose IoUs these are, has learned to follow its hints."""
    if fmean(full) < LEARNED:
        return Verdict(None, f"the full ControlNet does not follow its hints yet (IoU {shown(full)}): too few steps")
    return Verdict(agrees, why)


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
