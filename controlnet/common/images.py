"""Pictures: read a file as RGB, fit it to a size the model can make, to tensors and back, save PNG.

Sizes are (height, width) in pixels, as in tensors; only Pillow's own calls have width first.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.checkpoints.files import new_file

Size = tuple[int, int]

LONGEST_SHAPE = 16  # times as long as wide: a picture that is fitted is not to fill the memory


def described(size: Size) -> str:
    height, width = size
    return f"{width}x{height} (width x height)"


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file as RGB, 8 bit, upright as its camera says, transparent parts over white.

    Raises ValueError if there is no such file or it is not a picture that can be read whole.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f'"{path}" {found}: give the path of a picture')
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise ValueError(f'"{path}" is not readable as a picture ({error}): give a whole PNG, JPEG or WebP') from error
    if image.mode in ("I", "F"):
        raise ValueError(f'"{path}" has 32 bits a channel, expected 8 or 16 a channel: save it as such')
    return to_rgb(image)


def read_mask(path: str | Path) -> Image.Image:
    """The picture in a file as mode L. Raises ValueError as `read_image`, and if it is black everywhere."""
    mask = read_image(path).convert("L")
    if not mask.getbbox():
        raise ValueError(f'the mask "{path}" is black everywhere: paint white where something is to happen')
    return mask


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # a depth map, say: Pillow's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fitted_size(image: Image.Image, resolution: int, multiple: int) -> Size:
    """The size closest to the picture's shape whose short side is `resolution`, each side rounded to `multiple`.

    The rule of the published demos (annotator/util.py, resize_image). Raises ValueError for a strip of a picture.
    """
    if max(image.size) > LONGEST_SHAPE * min(image.size):
        raise ValueError(
            f"a picture is {described(image.size[::-1])}, expected at most {LONGEST_SHAPE} times as long as wide: cut "
            "it, or say the size that is wanted"
        )
    scale = resolution / min(image.size)
    return round(image.height * scale / multiple) * multiple, round(image.width * scale / multiple) * multiple


def resized(image: Image.Image, size: Size) -> Image.Image:
    """Exactly `size`: Lanczos if a side grows, else the mean over each new pixel's area.

    Pillow's nearest equivalents of what the published demos do with OpenCV; the pixels differ by small amounts.
    """
    height, width = size
    grows = height > image.height or width > image.width
    return image.resize((width, height), Image.Resampling.LANCZOS if grows else Image.Resampling.BOX)


def to_images(pictures: Iterable[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) -> (B, 3, H, W) in [-1, 1], the range inside the model."""
    return to_hints(pictures) * 2 - 1


def to_hints(pictures: Iterable[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) -> (B, 3, H, W) in [0, 1], the range of hints."""
    return torch.stack([torch.from_numpy(picture) for picture in pictures]).permute(0, 3, 1, 2) / 255


def to_uint8(hint: Tensor) -> np.ndarray:
    """A hint (3, H, W) in [0, 1] -> uint8 (H, W, 3); the inpaint hint's -1 becomes 0."""
    return (hint.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def to_mask(picture: Image.Image) -> Tensor:
    """A picture of mode L -> (1, 1, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture))[None, None] / 255


def to_picture(image: Tensor) -> Image.Image:
    """A tensor (3, H, W), around [-1, 1], of any floating dtype and device -> an 8-bit picture.

    Values are clipped and cut off, not rounded, as in the published demos:
    (127.5 y + 127.5).clip(0, 255).astype(np.uint8).
    """
    values = (127.5 * image.float() + 127.5).clamp(0, 255)
    return Image.fromarray(values.permute(1, 2, 0).byte().cpu().numpy())


def save_png(image: Image.Image, path: str | Path, texts: dict[str, str]) -> None:
    """Write a PNG with `texts` by their keywords. It is complete or not there: written aside, then renamed.

    A file that is there is replaced; what is no Unicode (a command line can have it) is written as in "\\udcff".
    Raises OSError if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
