"""A ControlNet on another base: one that was fine-tuned from its own, on a recoloured world."""

from statistics import fmean

import numpy as np
from torch import nn

from controlnet.worlds import Fill50k
from ldm import StableDiffusion
from tools.pretrain_common import train_part
from tools.pretrain_pictures import Pictures
from tools.pretrain_unet import BaseLoss, Batches, latents_of

from .experiment import Experiment
from .lab import BATCH, Lab, circles_measured
from .sheets import save_sheet
from .statistics import LEARNED, Verdict, above, judged, lost, numbers_table, shown

OWN, UNTOUCHED, MOVED = "its own base", "the other base, untouched", "the other base, difference of encoders added"
LR = 5e-4  # a third of what the base was trained with, with the same optimizer
LONGER = 3  # times the steps of a ControlNet: after as many it paints the other world's grounds, but not its discs yet


def recoloured(lab: Lab) -> StableDiffusion:
    """The base, its UNet trained further on negatives: a caption's red is painted cyan, and so on."""
    steps = LONGER * lab.scale.steps
    folder = lab.out / "runs" / f"recoloured-{steps}-{lab.fingerprint}"
    file = folder / "base.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sd = StableDiffusion.load(lab.base, lab.device)
        sd.schedule = sd.schedule.to(lab.device)
        world = Fill50k(sd.config.resolution)
        samples = [world[i] for i in range(lab.scale.images)]
        pictures = Pictures(np.stack([255 - s.image for s in samples]), [s.caption for s in samples])
        latents = latents_of(pictures, sd, folder / "latents.npy")
        batches = Batches(latents, pictures.captions, sd, BATCH, steps, seed=0)
        trained = nn.ModuleDict({"unet": sd.unet}).requires_grad_(True)
        where = folder, lab.device, lab.precision
        # Not the EMA that it returns, which needs more steps to forget where they began.
        train_part("unet", trained, BaseLoss(sd), batches, LR, lambda average, done: "", *where)
        sd.save(file)
    return StableDiffusion.load(file, lab.device)


def measure(lab: Lab) -> dict:
    other, prompts = recoloured(lab), [sample.caption for sample in lab.circles]

    def of_seed(seed: int) -> dict[str, dict[str, float]]:
        net = lab.load(lab.train(seed))
        drawn = {OWN: lab.draw_circles(net, prompts), UNTOUCHED: lab.draw_circles(net, prompts, sd=other)}
        net.transfer(lab.sd.unet, other.unet)
        drawn[MOVED] = lab.draw_circles(net, prompts, sd=other)
        if seed == 0:
            save_sheet(lab, "transfer", {"hints": [sample.hint for sample in lab.circles], **drawn})
        return {name: measured(images, lab) for name, images in drawn.items()}

    return {"bases": lab.over_seeds(of_seed)}


def measured(images: list[np.ndarray], lab: Lab) -> dict[str, float]:
    found = circles_measured(images, lab.circles)
    negatives = circles_measured([255 - image for image in images], lab.circles)
    return {**found, "negatives": negatives["colours"]}


def tables(numbers: dict) -> list[str]:
    columns = {"iou": "IoU with the hint", "colours": "the first world's colours", "negatives": "the other world's"}
    return [numbers_table(numbers["bases"], columns)]


def verdict(numbers: dict) -> Verdict:
    own, untouched = (numbers["bases"][name] for name in (OWN, UNTOUCHED))
    learned = untouched["negatives"]
    if fmean(learned) < LEARNED or not above(learned, untouched["colours"]):
        return Verdict(
            None, f"the other base has not learned its world: {shown(learned)} of its images have its colours"
        )
    words = f"IoU {shown(own['iou'])} on its own base, {shown(untouched['iou'])} on the other, untouched"
    return judged(own["iou"], not lost(own["iou"], untouched["iou"]), words)


EXPERIMENT = Experiment(
    title="Transfer to other bases (Figure 12, section 4.4)",
    claim="ControlNets can be used with other bases, fine-tuned from theirs, without being trained again.",
    how="The other base is this one, its UNet trained further on circles in negative, for three times the steps of a "
    "control. With prompts. That it has learned the other world is seen in its colours, both the negatives of the "
    "caption's. There is one such base: the deviations are those of ControlNets. The difference of the encoders, added "
    "as tools.transfer does, is not the paper's, and shown only.",
    measure=measure,
    tables=tables,
    verdict=verdict,
)
