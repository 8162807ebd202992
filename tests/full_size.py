"""SD 1.5 with a ControlNet at full size, filled with numbers: does it load and run here, how fast, in how much memory?

One evaluation at 512x512 and a decoded picture in this process, then controlled pictures of four steps at 256x256 from
the command line, in a plain and in a low-memory run.

    python tests/full_size.py [FOLDER FOR 5.7 GB]

No test, as it takes minutes and 8 GB of memory: weights come from the fill rule of reference.py, not from training.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from controlnet import ControlNet  # noqa: E402
from controlnet.guidance import Control, guided  # noqa: E402
from ldm import StableDiffusion  # noqa: E402
from tests.reference import filled_checkpoint, load_manifest  # noqa: E402


def peak_memory() -> float:
    """GB, the most that this process ever held (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def report(label: str, start: float) -> None:
    print(f"{label}: {time.perf_counter() - start:.1f} s, peak memory {peak_memory():.2f} GB", flush=True)
    reset_peak_memory()


def main(folder: Path) -> None:
    base, control = folder / "sd15.safetensors", folder / "control.safetensors"
    if not control.exists():
        filled_checkpoint(load_manifest("ldm_sd15_checkpoint"), base)
        filled_checkpoint(load_manifest("ldm_control_sd15_control_only"), control)
    in_this_process(base, control)
    for options in ((), ("--low-memory",)):
        from_the_command_line(base, control, *options)


def from_the_command_line(base: Path, control: Path, *options: str) -> None:
    start = time.perf_counter()
    command = [sys.executable, ROOT / "infer.py", "--base", base, "--control", control, "--hint", "circle.png"]
    command += ["--size", "256", "--steps", "4", "--device", "cpu", "--prompt", "a bird"]
    process = subprocess.Popen([*command, "--out", base.with_name("picture.png"), *options])
    _, status, usage = os.wait4(process.pid, 0)
    seconds, memory = time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9
    label = " ".join(("a picture of 256x256 in 4 steps from the command line", *options))
    cpu = usage.ru_utime + usage.ru_stime
    print(f"{label}: {seconds:.1f} s ({cpu:.1f} s of CPU time), peak memory {memory:.2f} GB", flush=True)
    assert status == 0


@torch.no_grad()
def in_this_process(base: Path, control: Path) -> None:
    reset_peak_memory()

    start = time.perf_counter()
    sd = StableDiffusion.load(base)
    net = ControlNet.load(control, sd.unet)
    parameters = sum(p.numel() * p.element_size() for part in (sd, net) for p in part.parameters())
    report(f"loaded {parameters / 1e9:.2f} GB of parameters", start)

    start = time.perf_counter()
    prompt, negative = sd.encode_text(["a bird"]), sd.encode_text([""])
    hint = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    denoise = guided(sd.unet, prompt, negative, 7.5, [Control(net, hint)])
    eps = denoise(x, torch.tensor([500]))
    report(f"one controlled, guided evaluation at 512x512 (deviation {eps.std():.3f})", start)

    start = time.perf_counter()
    image = sd.decode(x)
    report(f"decoded {tuple(image.shape)} (deviation {image.std():.3f})", start)
    assert eps.isfinite().all() and image.isfinite().all()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as name:
            main(Path(name))
