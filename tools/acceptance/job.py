"""What the stages of tools.accept work on: the device, the sizes, the models in their folder, and the reference."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlnet.common.devices import pick_device
from controlnet.model import ControlNet
from ldm import StableDiffusion
from ldm.config import SD15, SD21, TINY, Config, UNetConfig
from ldm.unet import UNet
from tools import bench
from tools.bench_case import Setup
from tools.bench_ours import SEED, fill, write_models

from .device import settle

SPACE = 12e9  # bytes: at full size models and reference need 9 GB, and the programs write beside them


SMALL = replace(
    TINY,
    name="small",
    unet=replace(TINY.unet, channels=16, multipliers=(1,), blocks=1, attention=(True,), heads=(2,), context_width=16),
    vae=replace(TINY.vae, channels=4, multipliers=(1, 1, 2, 2)),
    text=replace(TINY.text, width=16, heads=2, layers=1, vocabulary=600),
    resolution=64,
)


@dataclass(frozen=True)
class Size:
    """The sizes of all that is done. These are for SD 1.5 on a GPU."""

    config: Config = SD15
    other: UNetConfig = SD21.unet
    side: int = 512  # pixels
    large: tuple[int, ...] = (512, 1024, 2048)  # sides for --low-memory
    steps: int = 20  # of sampling, where time is taken
    count: int = 8  # images at once
    batches: tuple[int, ...] = (4, 8, 16)  # of training
    memory_batches: tuple[int, ...] = (1, 4, 16)
    runs: int = 7  # timings of each thing
    matrix: int = 8192  # the side of a large one
    train_steps: int = 20  # of each small training
    whole_training: tuple[str, ...] = ()  # options of the stage fill50k
    pictures: tuple[int, int, int] = (4, 10, 128)  # of the small model: how many, steps, pixels
    precision: str = "fp16"  # where time is taken


TINY_SIZE = Size(  # for the program itself, on a CPU
    config=SMALL,
    other=replace(SMALL.unet, linear_projections=True),
    side=64,
    large=(64, 96),
    steps=2,
    count=2,
    batches=(1, 2),
    memory_batches=(1,),
    runs=1,
    matrix=256,
    train_steps=2,
    whole_training=("--steps", "2", "--images", "8", "--size", "64", "--sample-count", "1", "--batch-size", "2"),
    pictures=(1, 1, 64),
    precision="bf16",
)
SIZES = {"full": Size(), "tiny": TINY_SIZE}


@dataclass
class Job:
    device: torch.device
    size: Size
    folder: Path
    background: list[multiprocessing.Process] = field(default_factory=list)

    def settle(self) -> None:
        settle(self.device)

    def setup(self, precision: str | None = None) -> Setup:
        """For the functions of tools.bench."""
        numbers = {"size": self.size.side, "steps": self.size.steps, "cfg": 7.5, "batch_size": 1}
        where = {"folder": self.folder, "device": str(self.device), "threads": torch.get_num_threads()}
        return Setup(**numbers, **where, checkpointing=False, precision=precision or self.size.precision)

    # ------------------------------------------------------------------------------------------------------- weights

    @property
    def models(self) -> list[str]:
        """Options of infer.py."""
        return ["--base", str(self.folder / "base.safetensors"), "--control", str(self.folder / "control.safetensors")]

    @property
    def small_models(self) -> list[str]:
        """The same for the models that ship or those in the folder, whichever are smaller."""
        return ["--base", "tiny", "--control", "circles"] if self.size.config is SD15 else self.models

    @torch.no_grad()
    def need_weights(self) -> None:
        """Makes the models on the device, in half precision and both layouts, unless they are in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "control").exists():  # the last that is written
            return
        torch.manual_seed(SEED)
        with self.device:
            sd, other = fill(StableDiffusion(self.size.config)), fill(UNet(self.size.other))
        save_file(
            {name: value.half().cpu().contiguous() for name, value in other.state_dict().items()},
            self.folder / "other.safetensors",
        )
        write_models(self.folder, sd, fill(ControlNet.from_unet(sd.unet)), torch.float16)

    def other_unet(self, device: torch.device, dtype: torch.dtype) -> UNet:
        with torch.device("meta"):
            unet = UNet(self.size.other)
        state = load_file(self.folder / "other.safetensors", str(device))
        unet.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
        return unet.eval().requires_grad_(False)

    # ---------------------------------------------------------------------------------------------- the reference

    def begin_in_background(self) -> None:
        """Starts a process for each file that the CPU computes while the device does something else, unless the folder
        has it."""
        self.need_weights()
        if self.background:
            return
        for file, function, *more in (
            ("reference.safetensors", "write_reference"),
            ("predictions.json", "write_predictions", self.device.type),
        ):
            if not (self.folder / file).exists():
                arguments = ("acceptance.compared", function, self.size, self.folder, *more)
                process = multiprocessing.get_context("spawn").Process(target=bench.call, args=arguments, daemon=True)
                process.start()
                self.background.append(process)

    def from_background(self, name: str) -> Path:
        """Waits for a file that those processes write. Raises ValueError if it does not come."""
        file = self.folder / name
        if not file.exists():
            self.begin_in_background()
        while not file.exists():
            if not any(process.is_alive() for process in self.background) and not file.exists():
                raise ValueError(f"{name} was not written: stderr tells why")
            for process in self.background:
                process.join(0.2)
        return file

    def reference(self) -> dict[str, Tensor]:
        """What `compared.write_reference` computes on the CPU, in fp32."""
        return load_file(self.from_background("reference.safetensors"))


@contextmanager
def job(device: str | None, size: str, folder: Path | None) -> Iterator[Job]:
    """Raises ValueError for a device that is not there."""
    picked = pick_device(device)
    if picked.type == "cuda":
        picked = torch.device("cuda", picked.index or 0)  # some of torch.cuda's functions refuse one without a number
        torch.cuda.set_device(picked)  # events and the profiler are the current device's
    with tempfile.TemporaryDirectory(dir=roomy_folder()) as temporary:
        work = Job(picked, SIZES[size], folder or Path(temporary))
        try:
            yield work
        finally:
            for process in work.background:
                process.terminate()
                process.join()


def roomy_folder() -> str | None:
    """Linux's folder in memory, if it is large enough, else None: the system's for temporary files."""
    memory = "/dev/shm"
    fits = os.path.isdir(memory) and shutil.disk_usage(memory).free > SPACE
    return memory if fits else None
