"""What pictures of scenes show of what was asked for, as the judge sees it: things in their colours and places, and the
classes and outlines of a hint. Beside each figure are a floor, the same against the next sample, and a ceiling, from
true pictures after the autoencoder."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from controlnet.inference.generate import generate
from controlnet.worlds import Sample, Scenes, Truth, World
from controlnet.worlds.classes import ADE20K_CLASSES, CLASSES
from controlnet.worlds.measures import mean_iou
from controlnet.worlds.scenes.captions import inventory
from controlnet.worlds.scenes.layout import place_at
from controlnet.worlds.world import Thing
from ldm import StableDiffusion
from tools.judge import COLOUR_NAMES, Judge
from tools.paint import Paint, after_autoencoder, mismatched

LEAST = 0.002  # of a picture's pixels make a thing count: 6x6 of 128x128

Seen = tuple[np.ndarray, np.ndarray]  # classes and colours, as Judge.see gives them


def report_prompts(sd: StableDiffusion, judge: Judge, count: int, settings: dict) -> None:
    """The base alone, from prompts that name all things of a scene, each with its colour and place."""
    samples = samples_of(Scenes(sd.config.resolution, held_out=True), count, scenes=True)
    prompts = [inventory(sample.truth.things) for sample in samples]
    pictures = [
        np.asarray(generate(sd, prompt, seed=i, **settings)[0]) for i, prompt in enumerate(tqdm(prompts, leave=False))
    ]
    things = [sample.truth.things for sample in samples]
    words = ("there in any colour", "in their colour", "in their colour and place")
    shares = compared(things_found, [judge.see(p) for p in pictures], best_seen(sd, judge, samples), things)
    lines = [f"{word} {shown}" for word, shown in zip(words, shares, strict=True)]
    print(f"base, things named in a scene's prompt: {', '.join(lines)}")


def report_scene_control(sd: StableDiffusion, judge: Judge, world: World, paint: Paint, count: int) -> None:
    samples = samples_of(world, count, scenes=True)
    truths, best = [sample.truth for sample in samples], best_seen(sd, judge, samples)
    for label, prompts in (
        ("prompts that name all", [inventory(truth.things) for truth in truths]),
        ("no prompt", [""] * count),
    ):
        asked = [replace(sample, caption=prompt) for sample, prompt in zip(samples, prompts, strict=True)]
        seen = [judge.see(image) for image in paint(asked)]
        against = partial(compared, seen=seen, best=best)
        (things,), (classes,) = against(things_iou, wanted=truths), against(classes_iou, wanted=truths)
        line = f"control, {world.name} with {label}: mean IoU of things {things}, of classes {classes}"
        if label == "prompts that name all":
            line += f", things in their colour {against(things_found, wanted=[t.things for t in truths])[1]}"
        print(line)


def samples_of(world: World, count: int, scenes: bool) -> list[Sample]:
    """The first samples that are scenes or, if not `scenes`, have figures on a plain ground."""
    samples = (world[i] for i in itertools.count())
    return list(itertools.islice((sample for sample in samples if (sample.truth is not None) == scenes), count))


def best_seen(sd: StableDiffusion, judge: Judge, samples: Sequence[Sample]) -> list[Seen]:
    """What is seen in the true pictures: no base with this autoencoder could paint better ones."""
    return [judge.see(image) for image in after_autoencoder(sd, [sample.image for sample in samples])]


def compared(measure: Callable[..., Sequence[float]], seen: list[Seen], best: list[Seen], wanted: list) -> list[str]:
    """The mean of `measure` over the pictures, with the floor, if there are several, and the ceiling, as text."""
    others = mismatched(wanted)

    def mean(pictures: list[Seen], asked: list) -> np.ndarray:
        return np.mean([measure(one, what) for one, what in zip(pictures, asked, strict=True)], axis=0)

    own, ceiling = mean(seen, wanted), mean(best, wanted)
    floors = [f"mismatched {floor:.3f}, " for floor in mean(seen, others)] if others else [""] * len(own)
    return [f"{a:.3f} ({floor}autoencoder {b:.3f})" for a, floor, b in zip(own, floors, ceiling, strict=True)]


def things_found(seen: Seen, things: Sequence[Thing]) -> tuple[float, float, float]:
    """The shares of `things` that are there in any colour, in theirs, and in theirs at their place."""
    return tuple(np.mean([found(seen, thing) for thing in things], axis=0))


def found(seen: Seen, thing: Thing) -> tuple[bool, bool, bool]:
    classes, colours = seen
    pixels = classes == CLASSES.index(thing.kind)
    coloured = pixels & (colours == COLOUR_NAMES.index(thing.colour))
    if coloured.mean() < LEAST:
        return bool(pixels.mean() >= LEAST), False, False
    x = (np.nonzero(coloured)[1].mean() + 0.5) / coloured.shape[1]
    return True, True, place_at(x) == thing.place


def things_iou(seen: Seen, truth: Truth) -> tuple[float]:
    """The mean over the things of a scene, all of which are of different classes."""
    numbers = np.array([*(CLASSES.index(thing.kind) for thing in truth.things), -1])
    return (mean_iou(seen[0], numbers[truth.objects]),)


def classes_iou(seen: Seen, truth: Truth) -> tuple[float]:
    """The mean over the classes of ADE20K that are in the scene, which a segmentation map can tell apart."""
    ade = np.array(list(ADE20K_CLASSES.values()))
    return (mean_iou(ade[seen[0]], ade[truth.classes]),)
