"""Large images out of little memory: MultiDiffusion (Bar-Tal et al., arXiv 2302.08113).

At each step the UNet sees the latents in overlapping tiles, each as large as the images that it was trained on, and the
hints cut to them. Its outputs are averaged where tiles overlap, with weights that fall towards the edges of a tile: one
passes smoothly into the next, where a plain mean has seams.

Shapes: h w positions of the latents, 8 pixels each.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from controlnet.common.images import Size
from controlnet.guidance import Control
from ldm.config import Config
from ldm.samplers import Denoise

OVERLAP = 4  # neighbours share this part of a tile: a quarter of its side


class Tile(NamedTuple):
    rows: slice
    columns: slice

    def of(self, x: Tensor, scale: int = 1) -> Tensor:
        """The part of (B, C, h, w), or of what is `scale` times as large."""
        rows, columns = (slice(scale * side.start, scale * side.stop) for side in self)
        return x[..., rows, columns]

    def of_control(self, control: Control, scale: int) -> Control:
        """With the parts of its hint and mask that lie in this tile."""
        hint, mask = control.hint, control.mask
        if mask is not None:
            mask = self.of(F.interpolate(mask, hint.shape[-2:], mode="area"), scale)
        return replace(control, hint=self.of(hint, scale), mask=mask)


def tiles_of(config: Config, size: Size) -> list[Tile]:
    """The tiles of an image of `size` pixels: none if it is no larger than one."""
    side, height, width = (pixels // config.vae.downscale for pixels in (config.resolution, *size))  # in latents
    if max(height, width) <= side:
        return []
    return [Tile(rows, columns) for rows in spans(height, side) for columns in spans(width, side)]


def spans(length: int, side: int) -> list[slice]:
    """As few spans of `side` as cover `length` and overlap by a quarter or more, evenly; all of it if it is shorter."""
    if length <= side:
        return [slice(0, length)]
    overlap = side // OVERLAP
    count = -(-(length - overlap) // (side - overlap))
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    return [slice(start, start + side) for start in starts]


def in_tiles(tiles: Sequence[Tile], denoisers: Sequence[Denoise], device: torch.device) -> Denoise:
    """A denoiser of the whole out of one for each tile."""
    shares = [share.to(device) for share in shares_of(tiles)]

    def denoise(x: Tensor, t: Tensor, timestep: float) -> Tensor:
        output = torch.zeros_like(x)
        for tile, denoise_tile, share in zip(tiles, denoisers, shares, strict=True):
            tile.of(output).add_(share * denoise_tile(tile.of(x), t, timestep))
        return output

    return denoise


def shares_of(tiles: Sequence[Tile]) -> list[Tensor]:
    """How much of the average each tile has, (h, w) of its own: at each position of the whole they add up to 1."""
    weights = [torch.outer(*(falling(side.stop - side.start) for side in tile)) for tile in tiles]
    total = torch.zeros([max(side.stop for side in sides) for sides in zip(*tiles, strict=True)])
    for tile, weight in zip(tiles, weights, strict=True):
        tile.of(total).add_(weight)
    return [weight / tile.of(total) for tile, weight in zip(tiles, weights, strict=True)]


def falling(length: int) -> Tensor:
    """Weights (length,): 1 in the middle, and over the overlap in a straight line towards 0 at both ends."""
    from_end = torch.arange(length) + 0.5
    return (torch.minimum(from_end, length - from_end) / (length / OVERLAP)).clamp(max=1)
