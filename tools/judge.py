"""Trains the judge, a small network that tells what pictures of scenes show: at each pixel a class and a colour.

    python -m tools.judge                                 # weights/judge.safetensors

tools.evaluate asks it whether the things of a prompt are in a picture, in their colour and place. It learns from
endless scenes, blurred and noisy at random, since pictures that a small base paints are never quite as sharp.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from controlnet.common.devices import use_device
from controlnet.common.images import to_images
from controlnet.common.program import new_parser, positive
from controlnet.objective import seeded
from controlnet.training.lr_schedules import cosine_schedule
from controlnet.worlds import Scenes, Truth
from controlnet.worlds.classes import CLASSES
from controlnet.worlds.scenes.paint import PAINTS
from ldm.checkpoints.published import WEIGHTS
from ldm.checkpoints.save import save_checkpoint
from tools.cli import add_device, check_output, run_tool
from tools.pretrain_common import prepared

COLOUR_NAMES = tuple(PAINTS)
JUDGE = WEIGHTS / "judge.safetensors"
WIDTHS = (48, 96, 128, 192)  # channels at half the size, a quarter, an eighth, a sixteenth


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.judge", __doc__)
    parser.add_argument("--out", type=Path, default=JUDGE, metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--size", type=positive, default=128, help="of the pictures (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=2500, help="(default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="(default: %(default)s)")
    add_device(parser)
    return run_tool(parser, argv, write_judge)


def write_judge(args: argparse.Namespace) -> None:
    check_output(args.out, force=True)
    if args.size % 32:
        raise ValueError(f"--size is {args.size}, expected a multiple of 32")
    train(args.out, args.size, args.steps, args.batch, use_device(args.device))
    print(f"wrote {args.out}")


class Judge(nn.Module):
    """A U-Net (Ronneberger et al., arXiv 1505.04597) with 2x2 pixels folded into its channels."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(block(a, b) for a, b in zip((12, *WIDTHS), WIDTHS, strict=False))
        self.up = nn.ModuleList(block(a + b, a) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
        self.out = nn.Conv2d(WIDTHS[0], 4 * (len(CLASSES) + len(COLOUR_NAMES)), 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> scores of the classes (B, 31, H, W) and of the colours (B, 12, H, W)."""
        levels, x = [], F.pixel_unshuffle(images, 2)
        for down in self.down:
            x = down(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for up, level in zip(reversed(self.up), reversed(levels[:-1]), strict=True):
            x = up(torch.cat([level, F.interpolate(x, scale_factor=2)], dim=1))
        return F.pixel_shuffle(self.out(x), 2).split([len(CLASSES), len(COLOUR_NAMES)], dim=1)

    @torch.no_grad()
    def see(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (H, W, 3) -> numbers in CLASSES and in COLOUR_NAMES, both (H, W). A thing's colour is the one that
        captions name: a house has the colour of its walls, on its roof, too."""
        classes, colours = self(to_images([image]).to(self.out.weight))
        return classes[0].argmax(dim=0).cpu().numpy(), colours[0].argmax(dim=0).cpu().numpy()


def block(inside: int, outside: int) -> nn.Sequential:
    layers = []
    for width in (inside, outside):
        layers += [nn.Conv2d(width, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)


def load_judge(file: Path = JUDGE) -> Judge:
    """Raises ValueError for a file that is missing or holds something else."""
    if not file.exists():
        raise ValueError(f"{file} is missing: train it with python -m tools.judge")
    judge = Judge()
    try:
        judge.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} is not a judge of this version: train it with python -m tools.judge") from error
    return judge.float().eval()


def train(out: Path, size: int, steps: int, batch: int, device: torch.device) -> None:
    """Trains a judge on `steps` batches of scenes of size x size pixels, and writes it to `out`."""
    torch.manual_seed(0)
    judge = Judge().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(100, steps))
    lessons = prepared(Lessons(Scenes(size, seed=1), batch, steps), 0, device)
    for lesson in (bar := tqdm(lessons, "judge", mininterval=10)):
        images, classes, colours = (tensor.to(device) for tensor in lesson)
        seen_classes, seen_colours = judge(images.to(memory_format=torch.channels_last))
        of_things = classes.masked_fill(colours < 0, -1)  # a tenth of the pixels, which therefore count twice
        loss = F.cross_entropy(seen_classes, classes) + F.cross_entropy(seen_classes, of_things, ignore_index=-1)
        loss = loss + F.cross_entropy(seen_colours, colours, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    save_checkpoint(out, judge.half().state_dict(), {})


@dataclass(frozen=True)
class Lessons(Dataset):
    """For each step images (B, 3, H, W), the numbers of their classes and those of their colours, both (B, H, W)."""

    world: Scenes
    batch: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        pictures = [self.world.draw(step * self.batch + i) for i in range(self.batch)]
        images = worn(to_images(picture.image for picture in pictures), seeded(0, step))
        classes = torch.stack([torch.from_numpy(picture.truth.classes) for picture in pictures]).long()
        return images, classes, torch.stack([torch.from_numpy(colours_of(picture.truth)) for picture in pictures])


def colours_of(truth: Truth) -> np.ndarray:
    """int64 (H, W): the number in COLOUR_NAMES of the thing that is seen there, -1 where none is."""
    table = np.array([*(COLOUR_NAMES.index(thing.colour) for thing in truth.things), -1])
    return table[truth.objects]


def worn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images blurred by up to a pixel and a half, and all with some noise."""
    half = len(images) // 2
    sigma = 0.3 + 1.2 * torch.rand((), generator=generator).item()
    images = torch.cat([gaussian_blur(images[:half], kernel_size=7, sigma=sigma), images[half:]])
    noise = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + noise * torch.randn(images.shape, generator=generator)


if __name__ == "__main__":
    sys.exit(main())
