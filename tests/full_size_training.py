"""SD 1.5 at full size takes optimiser steps here: time and peak memory, with and without cached latents and gradient
checkpointing, beside what controlnet/memory.py predicts.

    python tests/full_size_training.py [FOLDER FOR 4.3 GB] [SIDE IN PIXELS]

No test, as it takes minutes and 10 GB of memory: weights come from the fill rule of reference.py, not from training.
"""

import gc
import math
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from controlnet import ControlNet  # noqa: E402
from controlnet.objective import ControlLoss  # noqa: E402
from controlnet.training.latent_cache import encoded  # noqa: E402
from controlnet.training.memory import Plan, predict  # noqa: E402
from controlnet.training.optimisation import Optimisation, constant_rate  # noqa: E402
from ldm import StableDiffusion  # noqa: E402
from ldm.config import SD15  # noqa: E402
from ldm.unet import set_checkpointing  # noqa: E402
from tests.full_size import peak_memory, reset_peak_memory  # noqa: E402
from tests.reference import filled_checkpoint, load_manifest  # noqa: E402

CPU = torch.device("cpu")
STEPS = 2


def main(folder: Path, side: int) -> None:
    base = folder / "sd15.safetensors"
    if not base.exists():
        filled_checkpoint(load_manifest("ldm_sd15_checkpoint"), base)
    print(f"SD 1.5, {side}x{side}, batch 1, fp32, {torch.get_num_threads()} threads", flush=True)
    for cached in (True, False):
        for checkpointing in (True, False):
            measure(base, side, cached, checkpointing)
            gc.collect()


def measure(base: Path, side: int, cached: bool, checkpointing: bool) -> None:
    sd = StableDiffusion.load(base)
    control = ControlNet.from_unet(sd.unet)
    for model in (sd.unet, control):
        set_checkpointing(model, checkpointing)
    loss = ControlLoss(sd.unet, control, sd.schedule)
    optimisation = Optimisation(control.named_parameters(), 1e-5, constant_rate(1), CPU)
    generator = torch.Generator().manual_seed(0)
    image, hint = torch.rand(2, 1, 3, side, side, generator=generator)
    noise = torch.randn(1, 4, side // 8, side // 8, generator=generator)
    latents = encoded(sd, 2 * image - 1, ["a bird"])
    if cached:
        del sd.vae, sd.text_encoder
    reset_peak_memory()

    times, norm = [], math.nan
    for _ in range(STEPS):
        start = time.perf_counter()
        if not cached:
            latents = encoded(sd, 2 * image - 1, ["a bird"])
        value = loss(0.18215 * latents.mean, noise, torch.tensor([500]), latents.context, hint)
        optimisation.backward(value)
        norm = optimisation.step()
        times.append(time.perf_counter() - start)
    assert math.isfinite(norm) and value.isfinite()
    plan = Plan((side, side), checkpointing=checkpointing, cached=cached)
    print(
        f"{'cached' if cached else 'not cached'}, {'checkpointing' if checkpointing else 'no checkpointing'}: "
        f"{', '.join(f'{t:.1f}' for t in times)} s a step, peak {peak_memory():.2f} GB, "
        f"predicted {predict(SD15, plan).peak / 1e9:.2f} GB; loss {value:.4f}, gradient {norm:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    side = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), side)
    else:
        with TemporaryDirectory() as name:
            main(Path(name), side)
