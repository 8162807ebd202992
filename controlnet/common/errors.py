"""Errors that a user can put right, as a sentence each. Nothing here imports PyTorch."""

import re

REQUIRED = ("torch", "torchvision", "numpy", "PIL", "einops", "safetensors", "tqdm")  # by the names of their modules
DISK_ADVICE = "make room there, or give another place"


def in_a_sentence(error: BaseException, memory_advice: str, disk_advice: str = DISK_ADVICE) -> str | None:
    """The sentence for an error that a user can put right; None for any other."""
    if out_of_memory(error):
        return f"out of memory: {memory_advice}"
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIRED:
        return f"{error}: install what is needed with `pip install -r requirements.txt`"
    if isinstance(error, OSError):
        return of_a_file(error, disk_advice)
    if isinstance(error, OverflowError):
        return f"a number is too large ({error}): give a smaller one"
    return str(error) if isinstance(error, ValueError | FloatingPointError) else None


def of_a_file(error: OSError, disk_advice: str) -> str:
    """With advice by the error's words, since those of a worker process and of PyTorch have no number."""
    said = re.sub(r"^\[Errno \d+\] ", "", str(error))
    if "Broken pipe" in said:
        return "what reads the output has ended"
    if any(words in said for words in ("Permission denied", "not permitted", "Read-only")):
        return f"{said}: change the permissions there, or give another place"
    if any(words in said for words in ("No space left", "quota exceeded", "could not be written")):
        return f"{said}: {disk_advice}"
    if any(words in said for words in ("File exists", "s a directory", "Not a directory")):
        return f"{said}: something else is there, give another place"
    return said


def out_of_memory(error: BaseException) -> bool:
    """By the error's words, since CPUs and some devices have no exception of their own for it."""
    words = (
        "out of memory",
        "can't allocate memory",
        "Cannot allocate memory",
        "not enough memory",
        "STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
        "ALLOCATION_FAILED",  # of cuDNN from 9 on
        "unable to find an engine",  # cuDNN again, which then has no room for a workspace
    )
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
