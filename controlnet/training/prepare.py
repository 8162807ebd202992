"""What makes training faster or smaller and changes results by rounding alone: memory layouts, kernels,
gradient checkpointing, TF32."""

import os
from dataclasses import replace

import torch

from controlnet.common.devices import keep_freed_memory, use_precision
from controlnet.model import ControlNet
from ldm.fast.onednn import use_onednn_linear
from ldm.fast.packed import pack
from ldm.stable_diffusion import StableDiffusion
from ldm.unet import set_checkpointing

from .options import TrainSettings
from .saving import with_weights


def prepare_process(settings: TrainSettings, device: torch.device) -> TrainSettings:
    """PyTorch's own settings, for the whole process -> `settings` with the precision that `device` really has."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    return replace(settings, precision=use_precision(settings.precision, device))


def prepare_networks(sd: StableDiffusion, control: ControlNet, settings: TrainSettings, device: torch.device) -> None:
    """To be called once the weights are in place: it packs those of the locked encoder, which then cannot be copied."""
    for network in (sd.unet, control):
        network.to(memory_format=torch.channels_last)  # the faster layout for convolutions
        set_checkpointing(network, settings.checkpointing)
    if not settings.compile:  # torch.compile cannot look into what follows
        pack(sd.unet.encoder)  # not the decoder, which gradients come back through
        if (device.type, settings.precision) == ("cpu", "fp32"):
            use_onednn_linear(sd.unet.decoder, control)


def with_packed_encoders(sd: StableDiffusion) -> StableDiffusion:
    """`sd` with packed copies of its autoencoder and text encoder, for encoding many images fast. The originals keep
    their plain weights, which can stay in their file."""
    vae, text_encoder = (with_weights(network, {}) for network in (sd.vae, sd.text_encoder))  # around the same tensors
    pack(vae)
    pack(text_encoder)
    return sd.with_parts(vae=vae, text_encoder=text_encoder)


def keep_memory_in_the_loop(device: torch.device) -> None:
    """To be called when the loop begins, in which blocks of the same sizes come and go at each step: the autoencoder's
    activations would fragment the heap. On CUDA the memory that is reported is the peak from here on."""
    keep_freed_memory(device, large=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
