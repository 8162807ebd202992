"""Which memory a program keeps."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys, torch
from controlnet.common.devices import keep_freed_memory
if sys.argv[1] != "not":
    keep_freed_memory(torch.device("cpu"), large=sys.argv[1] == "large")
for _ in range(12):  # alignment may want a little more than what was freed
    torch.ones(2**18 * int(sys.argv[2]))  # so many MB, which are gone at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**18 * int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
@pytest.mark.parametrize(
    "kept, megabytes, again", [("not", 64, True), ("small", 64, True), ("large", 64, False), ("small", 24, False)]
)
def test_memory_that_was_freed_serves_the_next_tensor(kept, megabytes, again):
    """Without page faults, of which new memory takes dozens, even in large pages."""
    command = [sys.executable, "-c", FAULTS, kept, str(megabytes)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert (int(result.stdout) > 16) == again
