"""What every layout gives: the pairs, what is wrong with some, and what was left out."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


class BadSample(ValueError):
    """A pair that cannot be trained on: one sentence that names the file or the line."""


@dataclass(frozen=True)
class Entry:
    """Where one pair lies. `hint` is None where hints are made from the images."""

    image: Path
    hint: Path | None
    caption: str  # "" where there is none
    repeats: int = 1  # how often an epoch shows it


@dataclass(frozen=True)
class Wanted:
    """What a pair needs beside its image. Without `hints`, files of hints are not used. A `prompt` takes the place of
    all captions. `without_hints` tells the user what to do about a data set without hints."""

    hints: bool = True
    captions: bool = True
    prompt: str | None = None
    without_hints: str = (
        "add --detect NAME to make them from the images, or put some of the same names into hints/ beside images/"
    )

    def caption(self, found: str, complaint: str) -> str:
        """The caption of a pair for which `found` is written. Raises BadSample, with `complaint`, if one is missing."""
        if self.prompt is not None:
            return self.prompt
        if self.captions and not found.strip():
            raise BadSample(f"{complaint}, or --prompt TEXT for all pairs, or --prompt-dropout 1")
        return found.strip()


@dataclass(frozen=True)
class Listing:
    """The pairs of a data set, a sentence for each line or file that should be one and is not, and in a few words what
    else was found. Tar shards are not listed but named."""

    layout: str
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)

    def summary(self, prompt: str | None = None) -> str:
        """What was found, in a line; `prompt` is what stands for all captions."""
        captionless = sum(not entry.caption for entry in self.entries) if prompt is None else 0
        parts = [
            f"{self.layout}: {len(self.entries)} pairs",
            f'each with the prompt "{prompt}"' if prompt is not None else "",
            f"{captionless} of them without a caption" if captionless else "",
            f"{len(self.problems)} that cannot be used ({self.problems[0]})" if self.problems else "",
            f"left out: {', '.join(self.left_out)}" if self.left_out else "",
        ]
        return ", ".join(filter(None, parts))


def counted(what: str, found: Iterable[Path]) -> list[str]:
    """ "hints without an image (3: hints/7.png ...)", or nothing."""
    names = sorted(found)
    return [f"{what} ({len(names)}: {names[0]}{' ...' if len(names) > 1 else ''})"] if names else []
