"""Detectors that are networks, from the optional package controlnet_aux (Hugging Face, Apache-2.0).

It downloads a detector's weights from Hugging Face on first use. Each detector turns a uint8 RGB image (H, W, 3) into
such a hint. `device` is "auto" (a GPU if there is one), cpu, cuda, cuda:1 and so on. In a process that reads data for
training it is always the CPU: a forked process cannot use CUDA.
"""

from functools import cache

import numpy as np
from PIL import Image

ANNOTATORS = "lllyasviel/Annotators"  # where the authors of ControlNet published the weights


class NotInstalledError(ValueError):
    """The optional package, or something that it needs, is missing."""


def hed(image: np.ndarray, *, device: str = "auto") -> np.ndarray:
    """Soft edges, white on black (Xie and Tu, arXiv 1504.06375)."""
    return run(annotator(package().HEDdetector, device), image)


def mlsd(image: np.ndarray, *, score: float = 0.1, distance: float = 0.1, device: str = "auto") -> np.ndarray:
    """Straight lines, white on black (Gu et al., arXiv 2106.00186), above a `score` and a length, `distance`."""
    return run(annotator(package().MLSDdetector, device), image, thr_v=score, thr_d=distance)


def midas(image: np.ndarray, *, device: str = "auto") -> np.ndarray:
    """Depth, near is white (Ranftl et al., arXiv 1907.01341)."""
    return run(annotator(package().MidasDetector, device), image)


def openpose(image: np.ndarray, *, hands: bool = False, face: bool = False, device: str = "auto") -> np.ndarray:
    """Poses in colours on black (Cao et al., arXiv 1812.08008), optionally with `hands` and `face`."""
    return run(annotator(package().OpenposeDetector, device), image, include_hand=hands, include_face=face)


def lineart(image: np.ndarray, *, coarse: bool = False, device: str = "auto") -> np.ndarray:
    """A line drawing, white on black (Chan et al., arXiv 2203.12691), `coarse` or fine."""
    return run(annotator(package().LineartDetector, device), image, coarse=coarse)


def sam(image: np.ndarray) -> np.ndarray:
    """Segments in random colours, not by class (Kirillov et al., arXiv 2304.02643); on a GPU if there is one."""
    import torch

    if in_worker() and torch.cuda.is_available():
        raise ValueError("sam computes on the GPU, which a process that reads data cannot use: add --workers 0")
    return run(segmenter(), image)


def in_worker() -> bool:
    """Whether this is a process that reads data for training."""
    from torch.utils.data import get_worker_info  # here, because it imports PyTorch

    return get_worker_info() is not None


def package():
    try:
        import controlnet_aux
    except ImportError as error:
        raise NotInstalledError(
            f"this detector needs the package controlnet_aux ({error}): pip install controlnet_aux"
        ) from error
    return controlnet_aux


def annotator(detector_class: type, device: str):
    from controlnet.common.devices import pick_device  # here, because it imports PyTorch

    if in_worker():
        device = "cpu"
    return annotator_on(pick_device(None if device == "auto" else device), detector_class)


@cache
def annotator_on(device, detector_class: type):
    return loaded(lambda: detector_class.from_pretrained(ANNOTATORS)).to(device)


@cache
def segmenter():
    repository, folder = "ybelkada/segment-anything", "checkpoints"
    return loaded(lambda: package().SamDetector.from_pretrained(repository, subfolder=folder))


def loaded(load):
    """Raises NotInstalledError if weights or packages of this detector are missing, offline for example."""
    try:
        return load()
    except (OSError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise NotInstalledError(f"controlnet_aux could not load the detector: {reason}") from error


def run(detector, image: np.ndarray, **options) -> np.ndarray:
    """Detects at the image's resolution, which controlnet_aux rounds to multiples of 64, and resizes the hint back."""
    height, width = image.shape[:2]
    resolution = max(64, min(height, width))
    hint = detector(
        Image.fromarray(image), detect_resolution=resolution, image_resolution=resolution, output_type="pil", **options
    )
    return np.asarray(hint.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
