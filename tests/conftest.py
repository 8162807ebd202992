"""The tests' threads sleep while they wait, as those of the programs: see `share_cores`."""

from controlnet.common.program import share_cores

share_cores()
