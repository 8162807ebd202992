"""SD 1.5 with a ControlNet at full size, filled with numbers: does it load and run here, how fast, in how much memory?

    python tests/full_size.py [FOLDER FOR 5.7 GB]

No test, as it takes minutes and 8 GB of memory: weights come from the fill rule of reference.py, not from training.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

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


@torch.no_grad()
def main(folder: Path) -> None:
    base, control = folder / "sd15.safetensors", folder / "control.safetensors"
    if not control.exists():
        filled_checkpoint(load_manifest("ldm_sd15_checkpoint"), base)
        filled_checkpoint(load_manifest("ldm_control_sd15_control_only"), control)
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
