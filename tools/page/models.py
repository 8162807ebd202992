"""What lies in weights/, recognised by what is in it."""

from functools import lru_cache
from pathlib import Path

from ldm.checkpoints import published
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.published import FILE_SUFFIXES
from ldm.checkpoints.stored import CheckpointError
from tools.description import contents


def named(kind: str) -> list[str]:
    """The names by which infer.py finds those of a kind, "base" or "ControlNet"; a file may hold both."""
    found = (path for path in checkpoints() if kind in kind_of(path, path.stat().st_mtime))
    return [path.stem if path.suffix in FILE_SUFFIXES else path.name for path in found]


def checkpoints() -> list[Path]:
    files = published.WEIGHTS.iterdir()
    return sorted(path for path in files if path.suffix in FILE_SUFFIXES or (path / "model_index.json").is_file())


@lru_cache
def kind_of(path: Path, changed: float) -> str:
    try:
        return contents(open_checkpoint(path)).kind
    except CheckpointError:
        return "not readable"
