"""A folder that one process at a time writes to. The system frees the lock of a process that ends, in whatever way."""

import os
import platform
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from controlnet.common.program import note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK_NAME = ".lock"


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Makes `folder` if need be. Raises ValueError if another process has it or, with `wait`, waits until it is free.

    The lock is the process's alone: those that it forks do not hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_NAME, "a+", errors="replace") as file:
        said = False
        while not taken(file):
            file.seek(0)
            found = f'"{folder}" is being written by {file.read(200) or "another process"}'
            if not wait:
                raise ValueError(f"{found}: wait for its end, or give another folder as --out")
            if not said:
                said = True
                note(f"{found}: waiting for its end ...")
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def taken(file: IO) -> bool:
    """Whether the lock is ours now. Where the file system knows no locks, it is."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(10**6)  # locked bytes cannot be read, and the name of the holder is to be
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def holder(folder: Path) -> int | None:
    """The process that writes to `folder`, if one of this machine does. The system is asked, as what is written in the
    lock may be another container's number, and without a try at the lock, which would get in the way of a process that
    begins. Always None on Windows, which does not tell."""
    if fcntl is None or not (folder / LOCK_NAME).is_file():
        return None
    # C's struct flock for a lock on the whole file; in the answer it has the process that is in the way.
    if sys.platform == "darwin":
        layout, question, pid = "qqihh", (0, 0, 0, fcntl.F_WRLCK, 0), 2
    else:
        layout, question, pid = "hhqqi", (fcntl.F_WRLCK, 0, 0, 0, 0), 4
    with open(folder / LOCK_NAME, errors="replace") as file, suppress(OSError):  # of a file system without locks
        found = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *question)))[pid]
        if found > 0 and f" on {platform.node()} since " in file.read(200):  # 0: nobody, or not seen from here
            return found
    return None
