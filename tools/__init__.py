"""Programs around ControlNet: `python -m tools.NAME --help`."""

from controlnet.common.program import share_cores, stop_quietly

share_cores()  # before any of them imports PyTorch
stop_quietly()
