"""Saving and resuming a training run: one file, always whole, with everything that a step depends on."""

import os
from pathlib import Path

import torch


def save_state(path: Path, step: int, **parts) -> None:
    """Writes `step` and the `state_dict` of each part to `path`, first under a temporary name: a crash never leaves
    half a file in its place."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path, **parts) -> int:
    """Restores the parts in place and returns the number of steps done.

    Raises ValueError if the file is damaged or of another run (another base, another precision); some parts may have
    changed by then.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step = state.pop("step")
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise ValueError(
            f"{path} is not a run's state or it is damaged: start the run anew in another folder"
        ) from error
    if state.keys() != parts.keys():
        raise ValueError(f"{path} holds {sorted(state)}, but this run needs {sorted(parts)}: it is another kind of run")
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the {name} in {path} does not fit: resume with the base and the precision that the run started with"
            ) from error
    return step
