"""Images between their file and the model: sizes, resizing, conversion to tensors and back, PNG files.

Sizes are (height, width) in pixels, as in tensors; only Pillow's own calls have the width first.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.checkpoints.files import new_file

Size = tuple[int, int]

MAX_ASPECT_RATIO = 16  # a typo or an odd image must not exhaust the memory


def size_text(size: Size) -> str:
    height, width = size
    return f"{width}x{height} (width x height)"


def fitted_size(image: Image.Image, resolution: int, multiple: int) -> Size:
    """The size closest to the image's aspect ratio with `resolution` as its short side, both rounded to `multiple`.

    The rule of the published demos (annotator/util.py, resize_image). Raises ValueError for a very long image.
    """
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(
            f"an image is {size_text(image.size[::-1])}, expected at most {MAX_ASPECT_RATIO} times as long as wide: "
            "crop it, or give the size you want"
        )
    scale = resolution / min(image.size)
    return round(image.height * scale / multiple) * multiple, round(image.width * scale / multiple) * multiple


def resized(image: Image.Image, size: Size) -> Image.Image:
    """Exactly `size`: by Lanczos if a side grows, otherwise by averaging over each new pixel's area. The image is of
    mode RGB or L.

    As the published demos do with OpenCV, whose Lanczos differs slightly.
    """
    height, width = size
    if image.size == (width, height) or height > image.height or width > image.width:
        return image.resize((width, height), Image.Resampling.LANCZOS)
    return Image.fromarray(np.rint(averaged(averaged(np.asarray(image), height, 0), width, 1)).astype(np.uint8))


def averaged(values: np.ndarray, length: int, axis: int) -> np.ndarray:
    """`length` means along an axis, each over its interval of the values. A value counts by the part of it that lies in
    the interval, where Pillow's box filter takes it as a whole or not at all."""
    present = values.shape[axis]
    ends = np.arange(length + 1) * present / length
    starts, stops = ends[:-1], ends[1:]
    first, means = np.floor(starts).astype(int), 0
    for i in range(int((np.ceil(stops) - first).max())):  # the most values that an interval touches
        touched = first + i
        share = (np.minimum(stops, touched + 1) - np.maximum(starts, touched)).clip(min=0) * length / present
        share = share.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        means = means + share * values.take(touched.clip(max=present - 1), axis)
    return means


def fitted(image: Image.Image, size: Size, fit: str = "stretch", ground: tuple[int, ...] | int = 0) -> Image.Image:
    """Exactly `size`: stretched, or in its own shape, either cropped at the edges or padded with `ground`."""
    if fit == "pad":
        inner = size_within(image, size)
        padded = Image.new(image.mode, size[::-1], ground)
        padded.paste(resized(image, inner), tuple(reversed(margins(inner, size))))
        return padded
    return resized(cropped(image, size) if fit == "crop" else image, size)


def cropped(image: Image.Image, size: Size) -> Image.Image:
    """The largest part from the middle in the shape of `size`, to whole pixels."""
    scale = min(image.height / size[0], image.width / size[1])
    height, width = (max(1, round(scale * side)) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def size_within(image: Image.Image, size: Size) -> Size:
    """The largest size of the image's shape within `size`."""
    scale = min(size[0] / image.height, size[1] / image.width)
    return max(1, round(scale * image.height)), max(1, round(scale * image.width))


def margins(inner: Size, size: Size) -> Size:
    """The padding above and to the left of `inner` in the middle of `size`."""
    return (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2


def to_images(arrays: Iterable[np.ndarray]) -> Tensor:
    """uint8 RGB images (H, W, 3) -> (B, 3, H, W) in [-1, 1], the range inside the model."""
    return 2 * to_unit_range(np.stack(list(arrays))) - 1


def to_hints(arrays: Iterable[np.ndarray]) -> Tensor:
    """uint8 hints (H, W, C), RGB if C is 3, -> (B, C, H, W) in [0, 1]. float32 hints, with -1 in a hole to inpaint
    (hints/filters.py), keep their values."""
    hints = np.stack(list(arrays))
    return to_unit_range(hints) if hints.dtype == np.uint8 else torch.from_numpy(hints).permute(0, 3, 1, 2)


def to_unit_range(stacked: np.ndarray) -> Tensor:
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255


def check_values(what: str, values: Tensor) -> None:
    """Raises ValueError for values outside [0, 1], up to rounding, except the -1 in an inpainting hint's hole."""
    wrong = (values > 1.001) | ((values < -0.001) & ((values + 1).abs() > 0.001))
    if wrong.any():
        raise ValueError(
            f"{what} is from {values.min():g} to {values.max():g}, expected 0 to 1 (or -1, for a hole to inpaint): "
            "divide bytes by 255, and take (x + 1) / 2 of what is from -1 to 1"
        )


def to_uint8(hint: Tensor) -> np.ndarray:
    """A hint (C, H, W) in [0, 1] -> uint8 (H, W, C); the inpainting hint's -1 becomes 0."""
    return (hint.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def to_mask(image: Image.Image) -> Tensor:
    """An image of mode L -> (1, 1, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image))[None, None] / 255


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W), nominally in [-1, 1], of any floating-point dtype and on any device -> an 8-bit RGB image.

    Values are clipped, then truncated rather than rounded, as in the published demos:
    (127.5 y + 127.5).clip(0, 255).astype(np.uint8).
    """
    values = (127.5 * image.float() + 127.5).clamp(0, 255)
    return Image.fromarray(values.permute(1, 2, 0).byte().cpu().numpy())


def save_png(image: Image.Image, path: str | Path, texts: dict[str, str]) -> None:
    """Writes a PNG with `texts` as its text chunks, by keyword, atomically; an existing file is replaced.

    Characters that UTF-8 cannot encode, which a command line may contain, are written as escapes like "\\udcff". Raises
    OSError if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
