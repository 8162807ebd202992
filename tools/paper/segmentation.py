"""How well scenes follow their segmentation maps, by what a judge sees in them."""

import hashlib

import numpy as np

from controlnet.worlds import Seg
from tools.evaluate_scenes import classes_iou, samples_of
from tools.judge import JUDGE, Judge, load_judge
from tools.judge import train as train_judge
from tools.paint import after_autoencoder, mismatched

from .experiment import Experiment
from .lab import Lab
from .statistics import Verdict, above, all_of, numbers_table, shown

REAL, FLOOR = "real: true pictures after the autoencoder", "true pictures of other maps"


def judge_of(lab: Lab) -> Judge:
    """The judge of weights/, or one that is trained here."""
    file = lab.out / "runs" / f"judge-{lab.sd.config.resolution}-{lab.scale.steps}.safetensors"
    if not JUDGE.exists() and not file.exists():
        file.parent.mkdir(exist_ok=True)
        train_judge(file, lab.sd.config.resolution, 3 * lab.scale.steps, batch=12, device=lab.device)
    return load_judge(JUDGE if JUDGE.exists() else file)


def which_judge(lab: Lab) -> dict[str, str]:
    return {"judge": hashlib.sha256(JUDGE.read_bytes()).hexdigest()[:8] if JUDGE.exists() else "trained here"}


def measure(lab: Lab) -> dict:
    judge, world = judge_of(lab), Seg(lab.sd.config.resolution, held_out=True)
    samples = samples_of(world, lab.scale.samples, scenes=True)
    truths, hints, images = ([getattr(s, name) for s in samples] for name in ("truth", "hint", "image"))

    def fidelity(pictures: list[np.ndarray], wanted: list = truths) -> dict[str, float]:
        pairs = zip(pictures, wanted, strict=True)
        return {"iou": float(np.mean([classes_iou(judge.see(one), truth) for one, truth in pairs]))}

    def draw(seed: int) -> dict[str, list[np.ndarray]]:
        settings = dict(data="seg", steps=lab.scale.steps * 3 // 2)
        drawn = {}
        for name, more in (("full", {}), ("lite", {"architecture": "lite"})):
            net = lab.load(lab.train(seed, **settings, **more))
            drawn[name] = lab.draw([(net, hints)], [sample.caption for sample in samples])
        return drawn

    found = lab.drawn_over_seeds("segmentation", draw, fidelity, {"hints": hints, "true pictures": images})
    once = {
        REAL: fidelity(after_autoencoder(lab.sd, images)),
        "true pictures": fidelity(images),
        FLOOR: fidelity(images, mismatched(truths)),
    }
    return {"fidelity": found | {name: {"iou": [value["iou"]]} for name, value in once.items()}}


def tables(numbers: dict) -> list[str]:
    return [numbers_table(numbers["fidelity"], {"iou": "mean IoU of the classes"})]


def verdict(numbers: dict) -> Verdict:
    full, lite, real, floor = (numbers["fidelity"][name]["iou"] for name in ("full", "lite", REAL, FLOOR))
    if not above(full, floor):
        return Verdict(None, f"that full ({shown(full)}) follows its maps is not shown: chance is {shown(floor)}")
    words = f"full {shown(full)}, lite {shown(lite)}, real {shown(real)} (the paper: 0.35, 0.32, 0.58)"
    return Verdict(all_of(above(full, lite), above(real, full)), words)


EXPERIMENT = Experiment(
    title="Fidelity to segmentation maps (Table 2, section 4.3)",
    claim="Segmented again, images by ControlNet follow their maps better than those by ControlNet-lite, and less well "
    "than real ones.",
    how="Scenes with their captions. In OneFormer's place a small network that was trained on scenes alone "
    "(tools.judge) says what is seen; it reads every pixel as the map has it, and drawn pictures have sharper edges "
    "than photographs, so values are higher than the paper's. Half as many steps again as for circles, few for scenes.",
    measure=measure,
    tables=tables,
    verdict=verdict,
    settings=which_judge,
)
