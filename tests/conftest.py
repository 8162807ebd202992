"""The tests' threads sleep while they wait, as those of the programs: see `share_cores`. There is one, unless the user
has chosen: a tensor of the tests is computed sooner than another thread wakes."""

import gc
import os

from controlnet.common.program import share_cores

share_cores()
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """Modules and tests stay until the end: a tenth of all time went into looking through them for garbage."""
    gc.collect()
    gc.freeze()
