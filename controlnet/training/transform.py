"""The one transform of an image and its hint: resized to cover the size that is trained on, and cropped.

That size is one for all images or, with aspect buckets, for each the one of a few that is nearest to its shape.
Sizes are (height, width) in pixels, arrays uint8 (H, W, C).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from controlnet.common.images import Size, resized

LARGEST_ASPECT = 4  # of a bucket: 1024x256 at 512


def bucket_sizes(size: Size, multiple: int) -> tuple[Size, ...]:
    """Sizes of all shapes with no more pixels than `size` has, so that a batch of any takes no more memory.

    The sides are multiples of `multiple`: each width has the greatest height that fits, and each height such a width,
    as in NovelAI's aspect ratio bucketing (2022).
    """
    pixels = size[0] * size[1]
    tall = {(pixels // width // multiple * multiple, width) for width in range(multiple, max(size) * 2 + 1, multiple)}
    both = {size} | tall | {(width, height) for height, width in tall}
    return tuple(sorted(each for each in both if min(each) and max(each) <= LARGEST_ASPECT * min(each)))


@dataclass(frozen=True)
class Transform:
    """To `size`, or to one of `buckets`, cropped in the middle or at random, perhaps mirrored."""

    size: Size
    random_crop: bool = False
    flip: bool = False
    buckets: tuple[Size, ...] = ()

    def size_for(self, image_size: Size) -> Size:
        """`size`, or the bucket that is nearest in shape: the largest of those that are equally near."""

        def distance(size: Size) -> tuple[float, int]:
            return abs(math.log(size[0] * image_size[1] / (size[1] * image_size[0]))), -size[0] * size[1]

        return min(self.buckets, key=distance, default=self.size)

    def of(self, image_size: Size, generator: torch.Generator | None = None) -> Callable[[np.ndarray], np.ndarray]:
        """The function for an image of this size and for its hint, which then lie on each other, pixel by pixel.

        Without a generator nothing is random: the crop is in the middle, and nothing is mirrored.
        """
        height, width = size = self.size_for(image_size)
        covering = covering_size(image_size, size)
        slack = covering[0] - height, covering[1] - width
        top, left = slack[0] // 2, slack[1] // 2
        if self.random_crop and generator is not None:
            top, left = (int(torch.randint(s + 1, (), generator=generator)) for s in slack)
        mirrored = self.flip and generator is not None and bool(torch.rand((), generator=generator) < 0.5)

        def place(array: np.ndarray) -> np.ndarray:
            array = resized_array(array, covering)[top : top + height, left : left + width]
            return np.ascontiguousarray(array[:, ::-1] if mirrored else array)

        return place


def enlargement(image_size: Size, size: Size) -> float:
    """How many times as large an image becomes to cover `size`: more than 1 for a smaller one."""
    return max(size[0] / image_size[0], size[1] / image_size[1])


def covering_size(image_size: Size, size: Size) -> Size:
    scale = enlargement(image_size, size)
    return max(size[0], round(image_size[0] * scale)), max(size[1], round(image_size[1] * scale))


def cropped_share(image_size: Size, size: Size) -> float:
    """How much of the image's area the crop takes away."""
    covering = covering_size(image_size, size)
    return 1 - size[0] * size[1] / (covering[0] * covering[1])


def resized_array(array: np.ndarray, size: Size) -> np.ndarray:
    """(H, W, C) for any C: channel by channel, so that none is taken for a transparency that weighs the others."""
    if array.shape[:2] == size:
        return array
    if array.shape[2] == 3:
        return np.array(resized(Image.fromarray(array), size))
    channels = [resized(Image.fromarray(array[..., i]), size) for i in range(array.shape[2])]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)
