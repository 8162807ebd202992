"""Grids of what a ControlNet in training makes of the hints of a few samples."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from controlnet.common.images import Size, save_png, to_hints
from controlnet.guidance import Control, exact
from controlnet.hints.hint_image import in_rgb
from controlnet.inference.generate import make_denoise, prompt_contexts
from controlnet.inference.noise import draw, noise_from
from controlnet.inference.offload import decode
from controlnet.inference.sizes import default_cfg, latent_shape
from controlnet.model import ControlNet
from controlnet.worlds import Sample
from controlnet.worlds.measures import foreground, iou, keypoint_distance
from ldm import samplers
from ldm.stable_diffusion import StableDiffusion

from .options import TrainSettings
from .pair_files import read_hint, read_pixels
from .sources import hint_maker
from .transform import Transform


def own_samples(settings: TrainSettings, size: Size) -> list[Sample]:
    """The samples of --validate: hints, read and cropped or made like a folder's, with white in place of an image.
    Raises ValueError for a file that cannot be read."""
    maker, samples = hint_maker(settings.detect), []
    for file, prompt in settings.validate:
        path = Path(file)
        array = read_pixels(path, maker.ground) if maker else read_hint(path, settings.hint_channels)
        array = Transform(size).of(array.shape[:2])(array)
        hint = maker.make(array) if maker else array
        samples.append(Sample(np.full((*size, 3), 255, np.uint8), hint, prompt))
    return samples


class Preview:
    """Images for the hints of a few samples, always with the same seeds, so that steps can be compared. They are
    sampled in batches of the training's size, which without gradients need less memory than there."""

    def __init__(self, sd: StableDiffusion, samples: Sequence[Sample], batch_size: int, steps: int = 10):
        self.sd, self.samples, self.batch_size, self.steps = sd, samples, batch_size, steps

    def save(self, control: ControlNet, path: Path) -> dict[str, float]:
        """Writes the grid, a row for each sample, and returns the means of what `measure` says of the images."""
        rows, measures = [], []
        for sample, image in zip(self.samples, self.images(control), strict=True):
            measures.append(measure(sample, image))
            words = [sample.caption, *(f"{name} {value:.2f}" for name, value in measures[-1].items())]
            side = image.shape[:2]
            rows.append(np.hstack([in_rgb(sample.hint), image, sample.image, text_image(words, side)]))
        save_png(Image.fromarray(np.vstack(rows)), path, {})
        # of people and shapes in turn, only some have keypoints
        names = dict.fromkeys(name for values in measures for name in values)
        return {name: float(np.mean([m[name] for m in measures if name in m])) for name in names}

    def images(self, control: ControlNet) -> Iterator[np.ndarray]:
        for first in range(0, len(self.samples), self.batch_size):
            some = self.samples[first : first + self.batch_size]
            hints, prompts = to_hints(sample.hint for sample in some), [sample.caption for sample in some]
            yield from images_of(self.sd, prompts, [Control.in_mode(control, hints)], first, self.steps)


def measure(sample: Sample, image: np.ndarray) -> dict[str, float]:
    """How well an image follows its hint: of a figure on a plain ground, as in some of the synthetic datasets."""
    if sample.mask is None or sample.truth is not None:  # in a landscape, colours do not tell what the figure is
        return {}
    shown = foreground(image)
    values = {"iou": iou(shown, sample.mask)}
    if sample.keypoints is not None:
        values["keypoint_distance"] = keypoint_distance(shown, sample.keypoints)
    return values


@torch.no_grad()
def images_of(
    sd: StableDiffusion,
    prompts: Sequence[str],
    controls: Sequence[Control],
    seed: int,
    steps: int,
    cfg: float | None = None,
    eta: float = 0.0,
) -> list[np.ndarray]:
    """An image (H, W, 3), uint8, for each prompt and its hint of each control (B, C, H, W), with the seeds `seed`,
    `seed` + 1 ...: equal to `generate`'s, to rounding, but sampled as one batch.

    They are decoded one after the other: decoding needs the most memory, and one image fills a GPU."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    x = draw(generators, latent_shape(sd.config, tuple(controls[0].hint.shape[-2:]))).to(sd.device)
    contexts = [prompt_contexts(sd, prompt, "", clip_skip=1, long=False) for prompt in prompts]
    prompt, negative = map(torch.cat, zip(*contexts, strict=True))  # (B, 77, D)
    timesteps = samplers.timesteps_for("ddim", sd.schedule, steps)
    cfg = default_cfg(sd.config) if cfg is None else cfg
    denoise = make_denoise(sd, prompt, negative, cfg, controls, timesteps, batched=True, make_predictor=exact)
    latents = samplers.sample_loop("ddim", denoise, x, timesteps, sd.schedule, eta, noise_from(generators))
    denoise.check(latents)
    return [np.asarray(image) for one in latents.split(1) for image in decode(sd, one, tiled=False)]


def text_image(paragraphs: list[str], size: tuple[int, int]) -> np.ndarray:
    """Text on white, uint8 (H, W, 3), of `size`."""
    height, width = size
    image = Image.new("RGB", (width, height), "white")
    points = max(9, height // 18)
    lines = [line for text in paragraphs for line in [*textwrap.wrap(text, max(1, int(width / points * 1.8))), ""]]
    ImageDraw.Draw(image).multiline_text((4, 4), "\n".join(lines), "black", ImageFont.load_default(points))
    return np.asarray(image)
