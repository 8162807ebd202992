"""Numbers over a few seeds: means, standard deviations, and when two differ. Nothing here imports PyTorch."""

from collections.abc import Iterable, Sequence
from math import hypot
from statistics import fmean, stdev
from typing import NamedTuple

# Row of a table -> measure -> its values, one for each seed.
Numbers = dict[str, dict[str, list[float]]]

LEAST = 0.02  # a smaller difference, of an IoU or a share, does not count
LEARNED = 0.5  # the IoU above which a full ControlNet follows its hints: below, there is nothing to compare with
IS = {True: "is", False: "is not", None: "may be"}  # an answer in words
LOST = 0.1  # of an IoU: what loses more has lost the hint


class Verdict(NamedTuple):
    """What came out beside the paper's claim; None if nothing can be said."""

    agrees: bool | None
    why: str


def judged(full: Sequence[float], agrees: bool | None, why: str) -> Verdict:
    """What the numbers say, if the full ControlNet, whose IoUs these are, has learned to follow its hints. One training
    alone says nothing."""
    if fmean(full) < LEARNED:
        return Verdict(None, f"the full ControlNet does not follow its hints yet (IoU {shown(full)}): too few steps")
    if len(full) == 1:
        return Verdict(None, f"of one training: {why}")
    return Verdict(agrees, why)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation, or the only value."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def steps_shown(steps: Iterable[int | None]) -> str:
    """Where something happens, for each training."""
    return ", ".join(str(step or "never") for step in steps)


def above(high: Sequence[float], low: Sequence[float]) -> bool | None:
    """Whether one mean is above the other by more than one standard deviation of their difference, and by `LEAST`.

    False if the difference and its deviation together stay below `LEAST`: then it is not, or by nothing that counts.
    Otherwise it cannot be told: None, as always with one training each. A single value beside several is one that
    depends on no training.
    """
    if len(high) == len(low) == 1:
        return None
    spread = hypot(*(stdev(values) for values in (high, low) if len(values) > 1))
    difference = fmean(high) - fmean(low)
    if difference > max(spread, LEAST):
        return True
    return False if difference + spread < LEAST else None


def lost(before: Sequence[float], after: Sequence[float]) -> bool:
    return fmean(before) - fmean(after) > LOST


def all_of(*answers: bool | None) -> bool | None:
    """No if one of them is no, otherwise None if one of them is."""
    return next((answer for answer in (False, None) if answer in answers), True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown: the first column is text, all others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def numbers_table(numbers: Numbers, columns: dict[str, str]) -> str:
    """A row for each in `numbers`; `columns` are measures with their titles."""
    rows = [[name, *(shown(row[measure]) for measure in columns)] for name, row in numbers.items()]
    return table(["", *columns.values()], rows)
