"""What tools.accept finds: what must hold, aims and figures, written as JSON after each row and as a table at the end.

Nothing here imports PyTorch.
"""

import json
import math
import os
import time
from contextlib import suppress
from functools import partialmethod
from pathlib import Path
from typing import Any

from controlnet.common.files import read_json

PASSING = ("done", "skipped")  # the states of a stage that do not count against what must hold


class Skip(Exception):
    """What a stage needs is not here: its message says what."""


class Report:
    """A file of results, to which a later run adds its stages; one that runs again replaces its rows.

        {"device": "cuda", "size": "full", "stages": {"forward": {"state": "done", "seconds": 31.2, "rows": [
            {"what": "eps, fp16", "value": 0.0012, "kind": "must", "limit": "<= 0.005", "held": true}, ...]}, ...}}

    Raises ValueError if there is a file that holds something else, OSError if it cannot be written.
    """

    def __init__(self, path: Path, **of: str):
        self.path, self.values = path, {**of, "stages": {}}
        if path.exists():
            self.values = self.earlier(of)
        self.rows: list[dict[str, Any]] = []
        self.write()

    def earlier(self, of: dict[str, str]) -> dict:
        values = None
        with suppress(ValueError):  # of what is not JSON
            values = read_json(self.path)
        if not isinstance(values, dict) or not isinstance(values.get("stages"), dict):
            raise ValueError(f'"{self.path}" holds no results of this program: give another --out')
        if found := {name: values.get(name) for name in of if values.get(name) != of[name]}:
            raise ValueError(f'"{self.path}" holds results of another run ({found}): give another --out')
        return values

    # ------------------------------------------------------------------------------------------------- while they run

    def begin(self, stage: str) -> None:
        self.rows, self.began = [], time.monotonic()
        self.values["stages"][stage] = {"state": "running", "seconds": 0.0, "rows": self.rows}
        self.write()

    def end(self, stage: str, state: str, why: str = "") -> None:
        seconds = round(time.monotonic() - self.began, 1)
        self.values["stages"][stage] |= {"state": state, "seconds": seconds, **({"why": why} if why else {})}
        self.write()

    def note(self, what: str, value: Any) -> None:
        self.rows.append({"what": what, "value": plain(value), "kind": "figure"})
        self.write()

    def judge(self, kind: str, what: str, value: float, most: float = math.inf, least: float = -math.inf) -> None:
        """NaN does not hold."""
        limits = [f"<= {most:g}"] * (most < math.inf) + [f">= {least:g}"] * (least > -math.inf)
        limit = f"= {most:g}" if most == least else " and ".join(limits)
        held = bool(least <= value <= most)
        self.rows.append({"what": what, "value": plain(value), "kind": kind, "limit": limit, "held": held})
        self.write()

    must = partialmethod(judge, "must")  # else the run has failed
    aim = partialmethod(judge, "aim")  # hoped for

    def write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.values, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, self.path)

    # ------------------------------------------------------------------------------------------------------ at the end

    def broken(self) -> list[str]:
        """What must hold and does not, or was not found out."""
        broken = []
        for name, stage in self.values["stages"].items():
            if stage["state"] not in PASSING:
                broken.append(f"{name}: {stage['state']}")
            broken += [f"{name}: {row['what']}" for row in stage["rows"] if row["kind"] == "must" and not row["held"]]
        return broken

    def markdown(self) -> str:
        lines = [f"Device {self.values['device']}, models of size {self.values['size']}.", ""]
        lines += ["| stage | what | value | limit | |", "|---|---|---:|---|---|"]
        for name, stage in self.values["stages"].items():
            lines.append(f"| **{name}** | {cell(stage.get('why', ''))} | {stage['seconds']:g} s | | {stage['state']} |")
            lines += [row_line(row) for row in stage["rows"]]
        return "\n".join(lines) + "\n"


def row_line(row: dict[str, Any]) -> str:
    words = {("must", True): "holds", ("must", False): "**BROKEN**", ("aim", True): "met", ("aim", False): "missed"}
    limit = f"{row['kind']} {row['limit']}" if "limit" in row else ""
    value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
    return f"| | {cell(row['what'])} | {cell(value)} | {limit} | {words.get((row['kind'], row.get('held')), '')} |"


def cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float) else str(value)
