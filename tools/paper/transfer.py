"""A ControlNet on another base: one that was fine-tuned from its own, on a restyled world."""

from functools import partial
from statistics import fmean

import numpy as np
from torch import nn

from controlnet.worlds import Fill50k
from ldm import StableDiffusion
from tools.pretrain_common import train_part
from tools.pretrain_pictures import Pictures
from tools.pretrain_unet import BaseLoss, Batches, latents_of

from .experiment import Experiment
from .lab import BATCH, Lab, follows
from .statistics import LEARNED, Verdict, above, judged, lost, numbers_table, shown

OWN, UNTOUCHED, MOVED = "its own base", "the other base, untouched", "the other base, difference of encoders added"
TRUE = "true pictures of the other world"
LR = 5e-4  # a third of what the base was trained with, with the same optimizer
CREAM = 250, 240, 220  # RGB


def pastel(image: np.ndarray) -> np.ndarray:
    """In the other world's style: as of chalk on cream paper, every colour halfway to cream."""
    return np.rint((image + np.array(CREAM)) / 2).astype(np.uint8)


def restyled(lab: Lab) -> StableDiffusion:
    """The base, its UNet trained further on circles in pastel, with the captions that they have anyway."""
    folder = lab.out / "runs" / f"pastel-{lab.scale.steps}-{lab.fingerprint}"
    file = folder / "base.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sd = StableDiffusion.load(lab.base, lab.device)
        sd.schedule = sd.schedule.to(lab.device)
        world = Fill50k(sd.config.resolution)
        samples = [world[i] for i in range(lab.scale.images)]
        pictures = Pictures(np.stack([pastel(s.image) for s in samples]), [s.caption for s in samples])
        latents = latents_of(pictures, sd, folder / "latents.npy")
        batches = Batches(latents, pictures.captions, sd, BATCH, lab.scale.steps, seed=0)
        trained = nn.ModuleDict({"unet": sd.unet}).requires_grad_(True)
        where = folder, lab.device, lab.precision
        # Not the EMA that it returns, which needs more steps to forget where they began.
        train_part("unet", trained, BaseLoss(sd), batches, LR, lambda average, done: "", *where)
        sd.save(file)
    return StableDiffusion.load(file, lab.device)


def measure(lab: Lab) -> dict:
    other, prompts = restyled(lab), [sample.caption for sample in lab.circles]

    def draw(seed: int) -> dict[str, list[np.ndarray]]:
        net = lab.load(lab.train(seed))
        drawn = {OWN: lab.draw_circles(net, prompts), UNTOUCHED: lab.draw_circles(net, prompts, sd=other)}
        net.transfer(lab.sd.unet, other.unet)
        return drawn | {MOVED: lab.draw_circles(net, prompts, sd=other)}

    found = lab.drawn_over_seeds("transfer", draw, partial(measured, lab=lab))
    true = follows([pastel(sample.image) for sample in lab.circles], lab.circles)
    return {"bases": {**found, TRUE: {"iou": [true], "pastel": [1.0]}}}


def measured(images: list[np.ndarray], lab: Lab) -> dict[str, float]:
    """How well they follow their hints, and the share that is nearer to the true picture in pastel than to the true
    picture itself: the disc's place does not matter for that, as it is the same in both."""
    pairs = zip(images, lab.circles, strict=True)
    nearer = [apart(image, pastel(sample.image)) < apart(image, sample.image) for image, sample in pairs]
    return {"iou": follows(images, lab.circles), "pastel": fmean(nearer)}


def apart(image: np.ndarray, other: np.ndarray) -> float:
    return np.abs(image.astype(int) - other).mean()


def tables(numbers: dict) -> list[str]:
    columns = {"iou": "IoU with the hint", "pastel": "in pastel"}
    return [numbers_table(numbers["bases"], columns)]


def verdict(numbers: dict) -> Verdict:
    own, untouched = (numbers["bases"][name] for name in (OWN, UNTOUCHED))
    learned = untouched["pastel"]
    if fmean(learned) < LEARNED or not above(learned, own["pastel"]):
        return Verdict(None, f"the other base has not learned its world: {shown(learned)} of its images are in pastel")
    words = f"IoU {shown(own['iou'])} on its own base, {shown(untouched['iou'])} on the other, untouched"
    return judged(own["iou"], not lost(own["iou"], untouched["iou"]), words)


EXPERIMENT = Experiment(
    title="Transfer to other bases (Figure 12, section 4.4)",
    claim="ControlNets can be used with other bases, fine-tuned from theirs, without being trained again.",
    how="The other base is this one, its UNet trained further on circles in pastel, for as many steps as a control. "
    "(A stronger change, to negatives, was tried first, and not learned in three times these steps.) With prompts. An "
    "image is in pastel if it is nearer to the true picture in pastel than to that in full colour. There is one such "
    "base: the deviations are those of ControlNets. The difference of the encoders, added as tools.transfer does, is "
    "not the paper's, and shown only.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
