"""Our side of what tools.bench measures, and the models and inputs of both sides.

Tasks have the names of tools.bench's sections, here and in bench_peers.py; bench_case.py says what a task is.

Shapes: B batch, H W pixels, h = H/8, w = W/8.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from controlnet import ControlNet
from controlnet.common.devices import PRECISIONS, keep_freed_memory, lay_out, use_device, use_precision
from controlnet.common.images import to_hints
from controlnet.guidance import Control
from controlnet.inference.generate import Progress, generate
from controlnet.objective import ControlLoss, Drawn, loss_inputs
from controlnet.training.distributed import Process
from controlnet.training.latent_cache import encode
from controlnet.training.optimisation import Optimisation
from controlnet.training.options import FULL_SIZE, TrainSettings
from controlnet.training.prepare import keep_memory_in_the_loop, prepare_networks, with_packed_encoders
from controlnet.training.step import Step
from controlnet.worlds import TINY_CONTROL_OF, WORLDS
from controlnet.worlds.colours import BASIC_COLOURS
from ldm import StableDiffusion
from ldm.checkpoints.published import WEIGHTS
from ldm.config import SD15
from ldm.fast.packed import pack
from ldm.fast.tiled_vae import decode_tiled, posterior_tiled
from tools.bench_case import Outputs, Setup, Work, name_of

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEGATIVE = "red circle with blue background", "green"
SEED = 0
LEARNING_RATE = 1e-5
SAMPLES = 4  # of each synthetic dataset
SMALL_SIDE = 64  # pixels, which every base can make: enough to see whether a model is loaded correctly


# ---------------------------------------------------------------------------------------------------- models and inputs


def prepare(case: str, folder: Path, device: str | None, threads: int | None, precision: str) -> tuple[dict, str]:
    """Writes the models of a case -> device, threads and precision, as in Setup, and a description of the machine."""
    device, threads = use_device(device), threads or torch.get_num_threads()
    folder.mkdir(parents=True, exist_ok=True)
    if case == "tiny":
        sd = StableDiffusion.load("tiny")
        write_models(folder, sd, ControlNet.load(WEIGHTS / "tiny-fill50k.safetensors", sd.unet))
    elif not (folder / "control").exists():  # the last that is written
        torch.manual_seed(SEED)
        sd = StableDiffusion(SD15)
        write_models(folder, fill(sd), fill(ControlNet.from_unet(sd.unet)))
    packages = [f"{package} {version(package)}" for package in ("torch", "diffusers") if find_spec(package)]
    machine = {"device": str(device), "threads": threads, "precision": use_precision(precision, device)}
    return machine, f"{name_of(device)}, {threads} threads, {', '.join(packages)}"


def write_models(folder: Path, sd: StableDiffusion, control: ControlNet, dtype: torch.dtype | None = None) -> None:
    """base.safetensors and control.safetensors, and the folders base and control in diffusers' layout."""
    sd.save(folder / "base.safetensors", dtype)
    control.save(folder / "control.safetensors", dtype)
    if not (folder / "base").exists():  # it does if an earlier call was stopped here
        sd.save(folder / "base", dtype, layout="diffusers")
    control.save(folder / "control", dtype, layout="diffusers")


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Random weights that preserve the variance, zero convolutions included: every input shows in every output."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def inputs(side: int, batch_size: int = 1) -> tuple[Tensor, ...]:
    """Always the same, drawn on the CPU: images (B, 3, H, W) in [-1, 1], hints (B, 3, H, W) in [0, 1], noise and the
    posterior's noise (B, 4, h, w), timesteps (B,)."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.rand(2, batch_size, 3, side, side, generator=generator)
    noise = torch.randn(2, batch_size, 4, side // 8, side // 8, generator=generator)
    return 2 * images[0] - 1, images[1], *noise, torch.randint(1000, (batch_size,), generator=generator)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def load_base(setup: Setup) -> StableDiffusion:
    return StableDiffusion.load(setup.folder / "base.safetensors", setup.device, PRECISIONS[setup.precision])


def load(setup: Setup) -> tuple[StableDiffusion, ControlNet]:
    sd = load_base(setup)
    return sd, ControlNet.load(setup.folder / "control.safetensors", sd.unet)


# ------------------------------------------------------------------------------------------------------------- sampling


def sampling(setup: Setup) -> Work:
    """From prompt and hint to an image, as in infer.py once the models are loaded."""
    return partial(sample, *load_for_sampling(setup), setup.size, setup.steps, setup.cfg)


def load_for_sampling(setup: Setup) -> tuple[StableDiffusion, ControlNet]:
    keep_freed_memory(torch.device(setup.device), large=False)
    sd, control = load(setup)
    lay_out((sd.unet, control), torch.device(setup.device), setup.precision)
    pack(sd.unet, sd.vae, control)
    return sd, control


def sample(sd: StableDiffusion, control: ControlNet, side: int, steps: int, cfg: float, count: int = 1) -> Outputs:
    """`count` images of the same hint and prompt, as one batch."""
    controls, latents = [Control(control, inputs(side)[1])], {}  # of each image, after its last step
    settings = {"negative": NEGATIVE, "steps": steps, "cfg": cfg, "seed": SEED, "count": count, "batch_size": count}

    def keep(progress: Progress) -> None:
        latents[progress.image] = progress.x

    images = generate(sd, PROMPT, controls, callback=keep, **settings)
    return {"latents": torch.cat([latents[i] for i in range(count)]), "images": torch.stack(list(map(pixels, images)))}


def reuse(setup: Setup, every: int) -> Work:
    """Held-out samples of each synthetic dataset, made with the models in `weights/`: an approximation can only be
    judged on images that mean something."""
    keep_freed_memory(torch.device(setup.device), large=False)
    sd = StableDiffusion.load("tiny", setup.device, PRECISIONS[setup.precision])
    wanted = []  # captions with their controls
    for world, name in TINY_CONTROL_OF.items():
        net = ControlNet.load(WEIGHTS / f"{name}.safetensors", sd.unet)
        samples = WORLDS[world](sd.config.resolution, colours=BASIC_COLOURS, held_out=True)
        wanted += [(samples[i].caption, Control(net, to_hints([samples[i].hint]))) for i in range(SAMPLES)]
    pack(sd.unet, sd.vae, *(control.net for _, control in wanted))
    settings = {"steps": setup.steps, "cfg": setup.cfg, "reuse": every}

    def work() -> Outputs:
        images = [generate(sd, caption, [control], **settings)[0] for caption, control in wanted]
        return {"images": torch.stack([pixels(image) for image in images])}

    return work


def vae(setup: Setup, encode: bool, tiled: bool) -> Work:
    """The VAE with packed weights, or tiled, which takes plain ones."""
    model = load_base(setup).vae
    images, _, latents, *_ = (x.to(model.quant_conv.bias) for x in inputs(setup.size))
    if not tiled:
        keep_freed_memory(torch.device(setup.device), large=False)
        pack(model)
    ways = {
        (True, False): lambda: model.encode(images),
        (True, True): lambda: model.config.scale * posterior_tiled(model, images).mean,
        (False, False): lambda: model.decode(latents),
        (False, True): lambda: decode_tiled(model, latents),
    }
    return torch.no_grad()(lambda: {"output": ways[encode, tiled]()})


# ------------------------------------------------------------------------------------------------------------- training


def training(setup: Setup, cached: bool) -> Work:
    """One step of train.py from the batch to the changed weights, with latents and text states computed before or in
    it; without TF32, as in their script."""
    run = Training(setup)
    work = run.step(setup.batch_size, cached)
    if cached:
        run.drop_encoders()
    keep_memory_in_the_loop(run.device)
    return work


class Training:
    """A run of train.py just before its first step."""

    def __init__(self, setup: Setup):
        self.side, self.device = setup.size, torch.device(setup.device)
        chosen = {**FULL_SIZE, "lr": LEARNING_RATE, "warmup": 0}
        settings = TrainSettings(precision=setup.precision, checkpointing=setup.checkpointing, **chosen)
        self.sd = load_base(setup)
        self.control = ControlNet.load(setup.folder / "control.safetensors", self.sd.unet, dtype=torch.float32)
        self.control.train().requires_grad_(True)
        prepare_networks(self.sd, self.control, settings, self.device)
        self.sd.schedule = self.sd.schedule.to(self.device)
        self.loss = ControlLoss(self.sd.unet, self.control, self.sd.schedule)
        self.optimisation = Optimisation.from_settings(self.control.named_parameters(), settings, self.device)
        self.encoders = with_packed_encoders(self.sd)
        with torch.no_grad():
            self.empty_prompt = self.sd.encode_text([""])

    def drop_encoders(self) -> None:
        self.encoders = self.sd.vae.cpu(), self.sd.text_encoder.cpu()

    def batch(self, batch_size: int, cached: bool) -> Callable[[], tuple[Tensor, ...]]:
        """-> what gives a batch's inputs to the loss: encoded now, or at each call."""
        images, hints, noise, posterior_noise, t = (x.to(self.device) for x in inputs(self.side, batch_size))
        drawn = Drawn(t, noise, posterior_noise, dropped=torch.zeros_like(t, dtype=torch.bool))
        content = encode(self.encoders, images, [PROMPT] * len(t)) if cached else None

        def loss_batch() -> tuple[Tensor, ...]:
            encoded = content or encode(self.encoders, images, [PROMPT] * len(t))
            return loss_inputs(encoded, hints, drawn, self.sd.vae.config.scale, self.empty_prompt, self.device)

        return loss_batch

    def step(self, batch_size: int, cached: bool, accumulate: int = 1, record: bool = True) -> Work:
        batch = self.batch(batch_size, cached)
        step = Step(self.loss, self.optimisation, Process(0, 1, self.device), accumulate, record)

        def work() -> Outputs:
            loss, gradient = step(batch)
            return {"loss": loss, "gradient": gradient}

        return work


# --------------------------------------------------------------------------------------------------- loading and start


def loading(setup: Setup) -> Work:
    """The original layout, until every weight has been read once: a file that was opened may merely be mapped."""

    def work() -> Callable[[], Outputs]:
        sd, control = load(setup)
        read_all(sd, control)
        return partial(sample, sd, control, SMALL_SIDE, 1, setup.cfg)

    return work


@torch.no_grad()
def read_all(*models: nn.Module) -> None:
    for model in models:
        for parameter in model.parameters():
            parameter.sum()


def start(setup: Setup, infer: bool) -> Work:
    command = [sys.executable, "-c", "import torch"]
    if infer:
        command = [sys.executable, str(ROOT / "infer.py"), "--hint", "circle.png", "--steps", "1"]
        command += ["--device", setup.device, "--precision", setup.precision, "--out", str(setup.folder / "start.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(setup.threads)}

    def work() -> Outputs:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
        return {}

    return work
