"""`fill50k`, after ControlNet's published training example (lllyasviel/ControlNet, docs/train.md): the hint is a thin
white circle on black, the image a plain disc on a plain background. Circles may extend beyond the image."""

import numpy as np

from .colours import COLOURS
from .world import Picture, Sample, World


class Fill50k(World):
    """Captions: '<colour> circle with <colour> background'."""

    name = "fill50k"

    def __getitem__(self, index: int) -> Sample:
        rng = self.rng(index)
        disc, ground = rng.choice(self.colours, size=2, replace=False)
        x, y = rng.uniform(0.1, 0.9, size=2) * self.size
        radius = rng.uniform(0.08, 0.4) * self.size
        return draw_circle(self.size, x, y, radius, str(disc), str(ground))

    def draw(self, index: int) -> Picture:
        sample = self[index]
        return Picture(sample.image, sample.caption, sample.mask.astype(np.uint8), sample.mask)


def draw_circle(size: int, x: float, y: float, radius: float, disc: str, ground: str) -> Sample:
    """An anti-aliased disc around pixel (x, y), with its outline as the hint: 1.5 pixels wide, 2 at size 512."""
    rows, columns = np.mgrid[:size, :size] + 0.5
    distance = np.hypot(columns - x, rows - y) - radius  # (H, W), negative inside
    inside = np.clip(0.5 - distance, 0, 1)[..., None]  # the fraction of each pixel that the disc covers
    image = inside * COLOURS[disc] + (1 - inside) * np.array(COLOURS[ground])
    line = np.clip(0.5 + max(1.5, size / 256) / 2 - np.abs(distance), 0, 1)
    return Sample(
        image=np.rint(image).astype(np.uint8),
        hint=np.rint(255 * line).astype(np.uint8)[..., None].repeat(3, axis=2),
        caption=f"{disc} circle with {ground} background",
        mask=distance < 0,
    )
